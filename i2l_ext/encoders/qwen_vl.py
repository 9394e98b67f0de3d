"""Qwen2.5-VL: a picture, inside the prompt of Qwen-Image's edit model, to the last hidden states of its tokens.

These are the states after the final norm: ``hidden_states[-1]`` in transformers 4 and 5 alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from i2l_ext.encoders.dims import QwenVLDims
from i2l_ext.encoders.qwen_view import patch_angles, prompt_positions, window_order
from i2l_ext.encoders.skeleton import build_without_weights, file_keys, load_small_tensors, structure_of
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks, ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.layers import PictureCost, StreamedLayers, hidden_states, run_layers

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

ROPE_THETA = 1e6

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class VisionState:
    """One picture between two blocks of the vision tower, its patches window by window: the hidden states, the rotary
    tables, where the windows end, where the picture ends, and the order of the image tokens."""

    hidden: Tensor
    rotary: Rotary
    windows: Tensor
    whole: Tensor
    order: Tensor


def config(dims: QwenVLDims) -> Qwen2_5_VLConfig:
    """transformers' configuration for a model of these dimensions."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    rope = {"rope_type": "default", "mrope_section": list(dims.mrope)}
    rotary: dict[str, Any]
    if hasattr(Qwen2_5_VLTextConfig(num_hidden_layers=1), "rope_parameters"):  # transformers 5
        rotary = {"rope_parameters": {**rope, "rope_theta": ROPE_THETA}}
    else:
        rotary = {"rope_scaling": {**rope, "type": "default"}, "rope_theta": ROPE_THETA}
    text = {
        "hidden_size": dims.hidden,
        "num_hidden_layers": dims.layers,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "intermediate_size": dims.mlp,
        "vocab_size": dims.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128000,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        # the defaults are ids of the real vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
        **rotary,
    }
    vision = {
        "depth": dims.vision_layers,
        "hidden_size": dims.vision_hidden,
        "num_heads": dims.vision_heads,
        "intermediate_size": dims.vision_mlp,
        "out_hidden_size": dims.hidden,
        "fullatt_block_indexes": list(dims.full_attention),
        "patch_size": dims.patch,
        "spatial_merge_size": dims.merge,
        "temporal_patch_size": 2,
        "window_size": dims.window,
        "tokens_per_second": 2,
        "in_channels": 3,
        "hidden_act": "silu",
    }
    at = dims.template.index(dims.image_token)
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=dims.image_token,
        vision_start_token_id=dims.template[at - 1],
        vision_end_token_id=dims.template[at + 1],
        tie_word_embeddings=False,
    )


def _model(dims: QwenVLDims) -> Qwen2_5_VLForConditionalGeneration:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return build_without_weights(lambda: Qwen2_5_VLForConditionalGeneration(config(dims)))


def structure(dims: QwenVLDims) -> dict[str, tuple[int, ...]]:
    """{key in the files: shape} of every weight, the language model's head included."""
    return structure_of("qwen_vl", _model(dims))


def encode(
    paths: Sequence[Path],
    dims: QwenVLDims,
    batches: Sequence[Tensor],
    options: ComputeOptions,
    callbacks: Callbacks = NO_CALLBACKS,
) -> list[Tensor]:
    """Batches of ``qwen_view.patches`` [N, patches, values], one for each view, to tokens [N, tokens, hidden].

    The results are float32 on the CPU, without the template's first ``drop`` tokens. The weights are read once for
    all batches. Of the vocabulary only the template's rows are read; the language model's head is not read. Raises
    UserError for files that do not hold this model, Cancelled when the user wants to stop.
    """
    model = _model(dims)
    vision = vision_cost(dims) / (vision_cost(dims) + language_cost(dims))
    with TensorFiles(paths) as files:
        files.check({key: shape for key, shape in structure_of("qwen_vl", model).items() if key != "lm_head.weight"})
        tokens = _run_vision(files, model, dims, batches, options, callbacks.part(0, vision))
        return _run_language(files, model, dims, tokens, options, callbacks.part(vision, 1))


def vision_cost(dims: QwenVLDims) -> int:
    """Multiplications of a picture in the vision tower, up to a constant factor. Only for the progress."""
    return dims.merge**2 * dims.vision_layers * dims.vision_hidden * (4 * dims.vision_hidden + 3 * dims.vision_mlp)


def language_cost(dims: QwenVLDims) -> int:
    """The same for the language model."""
    return dims.layers * dims.hidden * (2 * dims.hidden + 3 * dims.mlp)


def _grid(patches: int, dims: QwenVLDims) -> int:
    return math.isqrt(patches) // dims.merge


def _run_vision(
    files: TensorFiles,
    model: nn.Module,
    dims: QwenVLDims,
    batches: Sequence[Tensor],
    options: ComputeOptions,
    callbacks: Callbacks,
) -> list[Tensor]:
    """The vision tower: batches [N, patches, values] to image tokens [N, grid * grid, hidden]."""
    tower = model.model.visual
    fixed = load_small_tensors("qwen_vl", model, tower, (tower.patch_embed, tower.merger), files, options, callbacks)
    unit = dims.merge**2

    def enter(batch: Tensor) -> VisionState:
        grid = _grid(batch.shape[1], dims)
        order, ends = window_order(grid, dims)
        order = order.to(options.device)
        angles = patch_angles(grid, dims, tower.rotary_pos_emb.inv_freq)
        angles = angles.unflatten(0, (-1, unit))[order].flatten(0, 1).repeat(1, 2)
        hidden = tower.patch_embed(batch[0]).unflatten(0, (-1, unit))[order].flatten(0, 1)
        whole = torch.tensor([0, len(hidden)], dtype=torch.int32)
        return VisionState(
            hidden, (angles.cos(), angles.sin()), ends.to(options.device), whole.to(options.device), order
        )

    def step(index: int, block: nn.Module, state: VisionState) -> VisionState:
        ends = state.whole if index in dims.full_attention else state.windows
        output = block(state.hidden, cu_seqlens=ends, position_embeddings=state.rotary)
        return replace(state, hidden=hidden_states(output))

    def leave(state: VisionState) -> Tensor:
        return tower.merger(state.hidden)[state.order.argsort()][None]

    def cost(batch: Tensor) -> PictureCost:
        patches, rotary = batch.shape[1], 2 * dims.vision_hidden // dims.vision_heads
        return PictureCost(
            between=patches * (dims.vision_hidden + rotary),
            inside=patches * (12 * dims.vision_hidden + 3 * dims.vision_mlp),
            pairs=dims.vision_heads * patches**2,
            result=patches // unit * dims.hidden,
        )

    streamed = StreamedLayers(
        layers=tower.blocks,
        keys=[file_keys("qwen_vl", model, block) for block in tower.blocks],
        enter=enter,
        step=step,
        leave=leave,
        cost=cost,
        batched=False,
    )
    tokens = run_layers(files, streamed, batches, options, callbacks, fixed=fixed)
    tower.to("meta")
    return tokens


def _run_language(
    files: TensorFiles,
    model: nn.Module,
    dims: QwenVLDims,
    image_tokens: Sequence[Tensor],
    options: ComputeOptions,
    callbacks: Callbacks,
) -> list[Tensor]:
    """The language model: image tokens [N, grid * grid, hidden] to the tokens kept [N, tokens, hidden]."""
    language = model.model.language_model
    fixed = load_small_tensors("qwen_vl", model, language, (language.norm,), files, options, callbacks)
    vocabulary = file_keys("qwen_vl", model, language.embed_tokens)["weight"]
    template = options.place(files.rows(vocabulary, dims.template))
    at = dims.template.index(dims.image_token)

    def enter(batch: Tensor) -> tuple[Tensor, Rotary]:
        positions = prompt_positions(math.isqrt(batch.shape[1]), dims).to(options.device)
        before, after = (part.expand(len(batch), -1, -1) for part in (template[:at], template[at + 1 :]))
        return torch.cat([before, batch, after], dim=1), language.rotary_emb(template, positions)

    def step(_: int, layer: nn.Module, state: tuple[Tensor, Rotary]) -> tuple[Tensor, Rotary]:
        hidden, rotary = state
        return hidden_states(layer(hidden, attention_mask=None, position_embeddings=rotary)), rotary

    def cost(batch: Tensor) -> PictureCost:
        tokens = batch.shape[1] + len(dims.template)
        return PictureCost(
            between=tokens * dims.hidden,
            inside=tokens * (8 * dims.hidden + 3 * dims.mlp),
            pairs=dims.heads * tokens**2,
            result=tokens * dims.hidden,
        )

    streamed = StreamedLayers(
        layers=language.layers,
        keys=[file_keys("qwen_vl", model, layer) for layer in language.layers],
        enter=enter,
        step=step,
        leave=lambda state: language.norm(state[0])[:, dims.drop :],
        cost=cost,
    )
    return run_layers(files, streamed, image_tokens, options, callbacks, fixed=fixed)
