"""The miniature's encoders as whole, trainable modules of transformers' classes.

Using a LoRA needs none of this: `i2l_ext.encoders` reads the files that are written here. The dimensions are
entries in `i2l_ext.encoders.dims`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DINOv3ViTModel, Qwen2_5_VLForConditionalGeneration, SiglipVisionModel

from i2l_ext.embed import NORMALIZATIONS
from i2l_ext.encoders import dinov3, qwen_view, qwen_vl, siglip2
from i2l_ext.encoders.dims import DINOV3_MINI, QWEN_VL_MINI, SIGLIP2_MINI
from i2l_ext.encoders.keys import file_key

DIMS: dict[str, Any] = {"siglip2": SIGLIP2_MINI, "dinov3": DINOV3_MINI, "qwen_vl": QWEN_VL_MINI}
BUILD: dict[str, Callable[[], nn.Module]] = {
    "siglip2": lambda: SiglipVisionModel(siglip2.config(SIGLIP2_MINI)),
    "dinov3": lambda: DINOv3ViTModel(dinov3.config(DINOV3_MINI)),
    "qwen_vl": lambda: Qwen2_5_VLForConditionalGeneration(qwen_vl.config(QWEN_VL_MINI)),
}


def named_as_in_files(kind: str, encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the keys that the published files have."""
    return {file_key(kind, key): value for key, value in encoder.state_dict().items()}


def normalised(kind: str, views: torch.Tensor) -> torch.Tensor:
    """Pixels in 0..1 [N, 3, S, S] as SigLIP or DINOv3 takes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (NORMALIZATIONS[kind].mean, NORMALIZATIONS[kind].std))
    return (views - mean) / std


def pooled(encoder: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The embedding that the i2L models use: the attention-pooled head, or the normed class token: [N, width]."""
    return encoder(inputs).pooler_output


def patches(views: torch.Tensor) -> torch.Tensor:
    """Pixels in 0..1 [N, 3, S, S] as Qwen-VL takes them, [N, patches, values]; S is a whole number of tokens."""
    dims, merge, patch = QWEN_VL_MINI, QWEN_VL_MINI.merge, QWEN_VL_MINI.patch
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (qwen_view.MEAN, qwen_view.STD))
    grid = dims.grid(views.shape[-1])
    tiles = ((views - mean) / std).reshape(-1, 3, grid, merge, patch, grid, merge, patch)
    tiles = tiles.permute(0, 2, 5, 3, 6, 1, 4, 7)
    return (
        tiles.unsqueeze(6)
        .expand(*tiles.shape[:6], qwen_view.FRAMES, patch, patch)
        .reshape(len(views), grid**2 * merge**2, -1)
    )


def tokens(encoder: nn.Module, views: torch.Tensor) -> torch.Tensor:
    """The last hidden states that the i2L models use, [N, tokens, width], from pixels in 0..1."""
    values = patches(views)
    grid = QWEN_VL_MINI.grid(views.shape[-1])
    ids = qwen_view.prompt(grid, QWEN_VL_MINI).expand(len(views), -1)
    side = grid * QWEN_VL_MINI.merge
    hidden = encoder.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=values.flatten(0, 1),
        image_grid_thw=torch.tensor([[1, side, side]]).expand(len(views), -1),
    ).last_hidden_state
    return hidden[:, QWEN_VL_MINI.drop :]
