"""Mini's encoders as whole, trainable modules of transformers' classes.

Making a LoRA does not need them: `i2l_ext.encoders` reads the files that training writes. Their dimensions are in
`i2l_ext.encoders.dims`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DINOv3ViTModel, Qwen2_5_VLForConditionalGeneration, SiglipVisionModel

from i2l_ext.converters.files import load_file
from i2l_ext.embed import NORMALIZATIONS
from i2l_ext.encoders import dinov3, qwen_view, qwen_vl, siglip2
from i2l_ext.encoders.dims import DINOV3_MINI, QWEN_VL_MINI, SIGLIP2_MINI
from i2l_ext.encoders.keys import file_key

ENCODER_DIMS: dict[str, Any] = {"siglip2": SIGLIP2_MINI, "dinov3": DINOV3_MINI, "qwen_vl": QWEN_VL_MINI}
ENCODER_CLASSES: dict[str, Callable[[], nn.Module]] = {
    "siglip2": lambda: SiglipVisionModel(siglip2.config(SIGLIP2_MINI)),
    "dinov3": lambda: DINOv3ViTModel(dinov3.config(DINOV3_MINI)),
    "qwen_vl": lambda: Qwen2_5_VLForConditionalGeneration(qwen_vl.config(QWEN_VL_MINI)),
}


def load_encoder(kind: str, path: Path) -> nn.Module:
    """A trained encoder, frozen, in fp32."""
    encoder = ENCODER_CLASSES[kind]()
    saved = load_file(path)
    encoder.load_state_dict({key: saved[file_key(kind, key)].float() for key in encoder.state_dict()})
    return encoder.eval().requires_grad_(False)


def encoder_file_weights(kind: str, encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The encoder's weights under the keys of the published files."""
    return {file_key(kind, key): value for key, value in encoder.state_dict().items()}


def normalize_pixels(kind: str, views: torch.Tensor) -> torch.Tensor:
    """Pixels [N, 3, S, S] in 0..1 -> the inputs of SigLIP2 or DINOv3, of the same shape."""
    return _normalize(views, NORMALIZATIONS[kind].mean, NORMALIZATIONS[kind].std)


def pooled_embedding(encoder: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The embedding [N, width] that i2L models use: SigLIP2's attention pooling, or DINOv3's class token."""
    return encoder(inputs).pooler_output


def qwen_patches(views: torch.Tensor) -> torch.Tensor:
    """Pixels [N, 3, S, S] in 0..1 -> the inputs of Qwen-VL, [N, patches, values]. S is a whole number of tokens."""
    dims, merge, patch = QWEN_VL_MINI, QWEN_VL_MINI.merge, QWEN_VL_MINI.patch
    grid = dims.grid(views.shape[-1])
    tiles = _normalize(views, qwen_view.MEAN, qwen_view.STD).reshape(-1, 3, grid, merge, patch, grid, merge, patch)
    tiles = tiles.permute(0, 2, 5, 3, 6, 1, 4, 7)
    return (
        tiles.unsqueeze(6)
        .expand(*tiles.shape[:6], qwen_view.FRAMES, patch, patch)
        .reshape(len(views), grid**2 * merge**2, -1)
    )


def qwen_tokens(encoder: nn.Module, views: torch.Tensor) -> torch.Tensor:
    """The last hidden states [N, tokens, width] that i2L models use, from pixels [N, 3, S, S] in 0..1."""
    values = qwen_patches(views)
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


def _normalize(views: torch.Tensor, *statistics: Sequence[float]) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return (views - mean) / std
