"""The built-in test model: Qwen-Image's class at a size that a processor trains in hours."""

from __future__ import annotations

from .qwen_image import qwen_image

MINI = qwen_image(
    "mini",
    "Miniature of Qwen-Image",
    depth=5,
    hidden=128,
    latent=48,
    text=64,
    condition=16,
    caution="Test LoRA: only `i2l draw` can use it.",
)
