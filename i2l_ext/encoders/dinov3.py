"""DINOv3: a picture to the normed class token of a vision transformer.

Architecture: Siméoni et al. 2025, "DINOv3" (arXiv:2508.10104), by transformers' ``DINOv3ViTModel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from i2l_ext.encoders.dims import Dinov3Dims
from i2l_ext.encoders.skeleton import build_without_weights, file_keys, load_small_tensors, structure_of
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks, ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.layers import PictureCost, StreamedLayers, hidden_states, run_layers

if TYPE_CHECKING:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer

Rotary = tuple[Tensor, Tensor]


def config(dims: Dinov3Dims) -> DINOv3ViTConfig:
    """transformers' configuration for a model of these dimensions."""
    from transformers import DINOv3ViTConfig

    return DINOv3ViTConfig(
        hidden_size=dims.hidden,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        intermediate_size=dims.mlp,
        patch_size=dims.patch,
        image_size=dims.image,
        num_register_tokens=dims.registers,
        hidden_act="silu",
        use_gated_mlp=True,
        layer_norm_eps=1e-5,
        layerscale_value=1.0,
        rope_theta=100.0,
        pos_embed_rescale=2.0,
        query_bias=False,
        key_bias=False,
        value_bias=False,
        proj_bias=True,
        mlp_bias=True,
        attention_dropout=0.0,
        drop_path_rate=0.0,
    )


def _model(dims: Dinov3Dims) -> DINOv3ViTModel:
    from transformers import DINOv3ViTModel

    return build_without_weights(lambda: DINOv3ViTModel(config(dims)))


def structure(dims: Dinov3Dims) -> dict[str, tuple[int, ...]]:
    """{key in the file: shape} of every weight."""
    return structure_of("dinov3", _model(dims))


def class_token(layer: DINOv3ViTLayer, hidden: Tensor, rotary: Rotary) -> Tensor:
    """The class token, [N, 1, hidden], after ``layer`` has run on all tokens [N, tokens, hidden].

    Nothing else of the last layer is used: so four fifths of its arithmetic are saved.
    """
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

    part, normed, token = layer.attention, layer.norm1(hidden), hidden[:, :1].contiguous()

    def split_heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (part.num_heads, -1)).transpose(1, 2)

    query = split_heads(
        part.q_proj(normed[:, :1].contiguous())
    )  # for a slice torch would copy the weights for each picture
    key, value = split_heads(part.k_proj(normed)), split_heads(part.v_proj(normed))
    _, key = apply_rotary_pos_emb(key, key, *rotary)  # the class token has no position and is not rotated
    mixed = scaled_dot_product_attention(query, key, value, scale=part.scaling).transpose(1, 2).flatten(2)
    token = token + layer.layer_scale1(part.o_proj(mixed))
    return token + layer.layer_scale2(layer.mlp(layer.norm2(token)))


def encode(
    paths: Sequence[Path],
    dims: Dinov3Dims,
    batches: Sequence[Tensor],
    options: ComputeOptions,
    callbacks: Callbacks = NO_CALLBACKS,
) -> list[Tensor]:
    """Batches of pixels [N, 3, image, image], normalised, float32, to embeddings [N, hidden], float32 on the CPU.

    The weights are read once for all batches. Raises UserError for files that do not hold this model, Cancelled
    when the user wants to stop.
    """
    model = _model(dims)
    layers = model._modules.get("model", model).layer  # transformers 5 wraps the layers once more

    def enter(batch: Tensor) -> tuple[Tensor, Rotary]:
        return model.embeddings(batch), model.rope_embeddings(batch)

    def step(index: int, layer: DINOv3ViTLayer, state: tuple[Tensor, Rotary]) -> tuple[Tensor, Rotary]:
        hidden, rotary = state
        if index == dims.layers - 1:
            return class_token(layer, hidden, rotary), rotary
        return hidden_states(layer(hidden, position_embeddings=rotary)), rotary

    with TensorFiles(paths) as files:
        files.check(structure_of("dinov3", model))
        fixed = load_small_tensors("dinov3", model, model, (model.embeddings, model.norm), files, options, callbacks)
        streamed = StreamedLayers(
            layers=layers,
            keys=[file_keys("dinov3", model, layer) for layer in layers],
            enter=enter,
            step=step,
            leave=lambda state: model.norm(state[0])[:, 0],
            cost=lambda _: PictureCost(
                between=dims.tokens * dims.hidden,
                inside=dims.tokens * (8 * dims.hidden + 3 * dims.mlp),
                pairs=dims.heads * dims.tokens**2,
                result=dims.hidden,
            ),
        )
        return run_layers(files, streamed, batches, options, callbacks, fixed=fixed)
