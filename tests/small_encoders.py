"""Encoders small enough for tests: their dimensions, random weights, and files of them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from i2l_ext.converters.files import WritePlan, write
from i2l_ext.encoders.dims import Dinov3Dims, QwenVLDims, SiglipDims

SIGLIP = SiglipDims(hidden=64, layers=3, heads=4, mlp=96, patch=8, image=32)
DINOV3 = Dinov3Dims(hidden=64, layers=3, heads=4, mlp=96, patch=8, image=32, registers=2)
QWEN_VL = QwenVLDims(
    hidden=64,
    layers=3,
    heads=4,
    kv_heads=2,
    mlp=96,
    vocab=40,
    mrope=(2, 3, 3),
    vision_hidden=32,
    vision_layers=3,
    vision_heads=2,
    vision_mlp=48,
    full_attention=(1,),
    template=(7, 3, 9, 30, 31, 32, 5, 6),
    image_token=31,
    drop=3,
    lowres=56,
    highres=150,  # five tokens a side: windows of four leave a rest
)

PRIVATE = Path(__file__).parent.parent / ".private"


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights that keep the size of what passes through: matrices of gain one, scales near one."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for key in sorted(shapes):
        shape = shapes[key]
        noise = torch.randn(shape, generator=random)
        scale = len(shape) == 1 and key.endswith(("weight", "lambda1"))
        tensors[key] = (
            1 + 0.1 * noise if scale else noise / math.sqrt(math.prod(shape[1:]) or 1) * (len(shape) > 1 or 0.1)
        )
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    with path.open("wb") as stream:
        write(stream, [WritePlan.of(key, tensor.to(dtype)) for key, tensor in tensors.items()])
    return path


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The greatest difference over the greatest value."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def fetched(folder: str, *requirements: str) -> Path:
    """A private folder with the requirements alone, filled once; skips the test where they are not to be had."""
    target = PRIVATE / folder
    done = target / ".complete"
    if not done.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(target)]
        outcome = subprocess.run([*command, *requirements], capture_output=True, text=True)
        if outcome.returncode:
            pytest.skip(f"{' '.join(requirements)} cannot be fetched here")
        done.touch()
    return target
