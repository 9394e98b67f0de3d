"""A LoRA on one branch of a diffusers pipeline, for Qwen-Image and Z-Image.

style = i2l_ext.hooks.branch.apply(pipe, "my_style.safetensors", branch="positive")
pipe("a cat", negative_prompt="blurry", true_cfg_scale=4.0)
style.remove()
"""

from i2l_ext.branch.pipelines import BRANCHES, AppliedLora, apply

__all__ = ["BRANCHES", "AppliedLora", "apply"]
