"""SigLIP2: a picture to the attention-pooled output of a SigLIP vision tower, or to its patch tokens.

Architecture: Tschannen et al. 2025, "SigLIP 2" (arXiv:2502.14786), by transformers' ``SiglipVisionModel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from i2l_ext.encoders.dims import SiglipDims
from i2l_ext.encoders.skeleton import build_without_weights, file_keys, load_small_tensors, structure_of
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks, ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.layers import PictureCost, StreamedLayers, hidden_states, run_layers

if TYPE_CHECKING:
    from transformers import SiglipVisionConfig, SiglipVisionModel


def config(dims: SiglipDims) -> SiglipVisionConfig:
    """transformers' configuration for a tower of these dimensions."""
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=dims.hidden,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        intermediate_size=dims.mlp,
        patch_size=dims.patch,
        image_size=dims.image,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
    )


def _model(dims: SiglipDims) -> SiglipVisionModel:
    from transformers import SiglipVisionModel

    return build_without_weights(lambda: SiglipVisionModel(config(dims)))


def structure(dims: SiglipDims) -> dict[str, tuple[int, ...]]:
    """{key in the file: shape} of every weight."""
    return structure_of("siglip2", _model(dims))


def encode(
    paths: Sequence[Path],
    dims: SiglipDims,
    batches: Sequence[Tensor],
    options: ComputeOptions,
    callbacks: Callbacks = NO_CALLBACKS,
) -> list[Tensor]:
    """Batches of pixels [N, 3, image, image], normalised, float32, to embeddings [N, hidden], float32 on the CPU;
    without ``dims.pooled`` to the patches' tokens [N, tokens, hidden], row by row.

    The weights are read once for all batches. Raises UserError for files that do not hold this model, Cancelled
    when the user wants to stop.
    """
    model = _model(dims)
    tower = model._modules.get("vision_model", model)  # transformers 4 wraps the tower once more

    def leave(hidden: Tensor) -> Tensor:
        tokens = tower.post_layernorm(hidden)
        if not dims.pooled:
            return tokens
        # one by one: for several, torch's attention copies the head's matrix once a token (5 GB for five pictures)
        return torch.cat([tower.head(one) for one in tokens.split(1)])

    parts = [tower.embeddings, tower.post_layernorm] + [tower.head] * dims.pooled
    with TensorFiles(paths) as files:
        files.check(structure_of("siglip2", model))
        fixed = load_small_tensors("siglip2", model, tower, parts, files, options, callbacks)
        streamed = StreamedLayers(
            layers=tower.encoder.layers,
            keys=[file_keys("siglip2", model, layer) for layer in tower.encoder.layers],
            enter=tower.embeddings,
            step=lambda _, layer, hidden: hidden_states(layer(hidden, attention_mask=None)),
            leave=leave,
            cost=lambda _: PictureCost(
                between=dims.tokens * dims.hidden,
                inside=dims.tokens * (8 * dims.hidden + 2 * dims.mlp),
                pairs=dims.heads * dims.tokens**2,
                result=dims.hidden * (1 if dims.pooled else dims.tokens),
            ),
        )
        return run_layers(files, streamed, batches, options, callbacks, fixed=fixed)
