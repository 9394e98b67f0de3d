"""HiDream-O1-Image: the language and vision model Qwen3-VL 8B, which generates patches of pixels."""

from __future__ import annotations

from .base import Architecture, LayerKind, LayerStack


def hidream_o1(
    id: str,
    title: str,
    *,
    depth: int,
    hidden: int,
    kv: int,
    mlp: int,
    vocabulary: int,
    vision_depth: int,
    vision: int,
    vision_mlp: int,
    taps: int,
    patch: int,
    bottleneck: int,
) -> Architecture:
    """DiffSynth-Studio's class HiDreamO1ImageModel at any size.

    ``depth`` blocks of width ``hidden``, of keys and values ``kv`` and of feed-forward width ``mlp``; ``vocabulary``:
    number of tokens; ``vision_depth`` blocks of the eye, of width ``vision`` and ``vision_mlp``, and ``taps`` mergers
    of its inner layers; ``patch``: values of a patch of pixels, which enter through ``bottleneck``. Names are those of
    the checkpoint, which begin with ``model.``.
    """
    h, v = hidden, 4 * vision
    language = (
        LayerKind("self_attn.q_proj", h, h),
        LayerKind("self_attn.k_proj", h, kv),
        LayerKind("self_attn.v_proj", h, kv),
        LayerKind("self_attn.o_proj", h, h),
        LayerKind("mlp.gate_proj", h, mlp),
        LayerKind("mlp.up_proj", h, mlp),
        LayerKind("mlp.down_proj", mlp, h),
    )
    eye = (
        LayerKind("attn.qkv", vision, 3 * vision),
        LayerKind("attn.proj", vision, vision),
        LayerKind("mlp.linear_fc1", vision, vision_mlp),
        LayerKind("mlp.linear_fc2", vision_mlp, vision),
    )
    merger = (LayerKind("linear_fc1", v, v), LayerKind("linear_fc2", v, h))
    singles = (
        LayerKind("model.visual.merger.linear_fc1", v, v),
        LayerKind("model.visual.merger.linear_fc2", v, h),
        LayerKind("model.t_embedder1.mlp.0", 256, h),
        LayerKind("model.t_embedder1.mlp.2", h, h),
        LayerKind("model.x_embedder.proj1", patch, bottleneck),
        LayerKind("model.x_embedder.proj2", bottleneck, h),
        LayerKind("model.final_layer2.linear", h, patch),
        LayerKind("lm_head", h, vocabulary),
    )
    stacks = (
        LayerStack("model.language_model.layers", depth, language),
        LayerStack("model.visual.blocks", vision_depth, eye),
        LayerStack("model.visual.deepstack_merger_list", taps, merger),
    )
    return Architecture(id, title, "hidream-o1", stacks, singles)


HIDREAM_O1 = hidream_o1(
    "hidream-o1",
    "HiDream-O1-Image",
    depth=36,
    hidden=4096,
    kv=1024,
    mlp=12288,
    vocabulary=151936,
    vision_depth=27,
    vision=1152,
    vision_mlp=4304,
    taps=3,
    patch=3072,
    bottleneck=1024,
)
"""Sizes: DiffSynth-Studio's models/hidream_o1_image_dit.py. Its hash of the checkpoint's structure is that of this
class; a test recomputes it."""
