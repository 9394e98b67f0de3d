"""What Qwen2.5-VL takes of a square picture: its patches, their order and their positions. No weights here.

Written from the model's description (Bai et al. 2025, arXiv:2502.13923); tests compare it with transformers.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from i2l_ext.encoders.dims import QwenVLDims

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""The colour statistics that CLIP used."""

FRAMES = 2
"""A patch spans two frames of a video; a picture fills both."""


def patches(image: Image.Image, dims: QwenVLDims) -> np.ndarray:
    """The patches of a square picture, float32 [patches, 3 * FRAMES * patch * patch], as transformers' processor gives
    them. ValueError where it is not square.

    The side is scaled (bicubic) to a whole number of image tokens. The merge x merge patches of a token are
    neighbours.
    """
    if image.width != image.height:
        raise ValueError("a Qwen2.5-VL view must be square")
    grid, merge, patch = dims.grid(image.width), dims.merge, dims.patch
    side = grid * merge * patch
    scaled = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
    values = (scaled.astype(np.float64) * (1 / 255)).astype(np.float32)  # the processor's own roundings
    values = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    tiles = values.reshape(grid, merge, patch, grid, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    frames = np.repeat(tiles[:, :, :, :, :, None], FRAMES, axis=5)
    return frames.reshape(dims.patches(image.width), -1)


def window_order(grid: int, dims: QwenVLDims) -> tuple[Tensor, Tensor]:
    """The image tokens of a grid x grid picture, window by window: their indices [grid * grid], and window ends.

    The ends count patches and start with 0, int32, as ``cu_seqlens`` needs them.
    """
    size = dims.window // (dims.merge * dims.patch)
    tokens = torch.arange(grid * grid).reshape(grid, grid)
    windows = [
        tokens[row : row + size, column : column + size].reshape(-1)
        for row in range(0, grid, size)
        for column in range(0, grid, size)
    ]
    ends = torch.tensor([0, *(len(window) * dims.merge**2 for window in windows)]).cumsum(0)
    return torch.cat(windows), ends.int()


def patch_angles(grid: int, dims: QwenVLDims, frequencies: Tensor) -> Tensor:
    """Rotary angles [patches, 2 * len(frequencies)] by row and column, patches in the order of ``patches``.

    In the dtype of ``frequencies``, as in the authors' package.
    """
    rows = torch.arange(grid * dims.merge).reshape(grid, dims.merge)
    by_token = rows[:, None, :, None].expand(grid, grid, dims.merge, dims.merge)
    positions = torch.stack([by_token.reshape(-1), by_token.permute(1, 0, 3, 2).reshape(-1)], dim=1)
    positions = positions.to(frequencies.device)
    table = torch.outer(torch.arange(grid * dims.merge).to(frequencies), frequencies)
    return table[positions].flatten(1)


def prompt(grid: int, dims: QwenVLDims) -> Tensor:
    """The template's token ids, with an image token for each of the picture's, int64 [tokens]."""
    at = dims.template.index(dims.image_token)
    pads = [dims.image_token] * (grid * grid)
    return torch.tensor([*dims.template[:at], *pads, *dims.template[at + 1 :]])


def prompt_positions(grid: int, dims: QwenVLDims) -> Tensor:
    """Time, row and column of every token of ``prompt``, int64 [3, 1, tokens].

    In text all three are equal and count up. In a picture time is constant, and rows and columns count up from it. The
    text after it continues after the greatest of them.
    """
    at = dims.template.index(dims.image_token)
    before = torch.arange(at).expand(3, -1)
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    picture = at + torch.stack([torch.zeros_like(row), row, column]).reshape(3, -1)
    after = at + grid + torch.arange(len(dims.template) - at - 1).expand(3, -1)
    return torch.cat([before, picture, after], dim=1)[:, None]
