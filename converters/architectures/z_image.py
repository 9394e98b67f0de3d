"""Z-Image: 30 blocks, and two refiners of two blocks each."""

from __future__ import annotations

from .base import Architecture, LayerKind, LayerStack


def z_image(id: str, title: str, *, depth: int, refiners: int, hidden: int, mlp: int, text: int) -> Architecture:
    """The class ZImageTransformer2DModel at any size.

    ``depth`` main blocks and ``refiners`` blocks of each refiner, of width ``hidden`` and feed-forward width ``mlp``;
    ``text``: width of the prompt's embedding. The first implementation has q, k and v as one layer.
    """
    h = hidden
    kinds = (
        LayerKind("attention.to_q", h, h, 0),
        LayerKind("attention.to_k", h, h, 0),
        LayerKind("attention.to_v", h, h, 0),
        LayerKind("attention.to_out.0", h, h, 0),
        LayerKind("feed_forward.w1", h, mlp, 1),
        LayerKind("feed_forward.w2", mlp, h, 1),
        LayerKind("feed_forward.w3", h, mlp, 1),
    )
    modulated = (*kinds, LayerKind("adaLN_modulation.0", 256, 4 * h))
    stacks = (
        LayerStack("layers", depth, modulated),
        LayerStack("context_refiner", refiners, kinds),
        LayerStack("noise_refiner", refiners, modulated),
    )
    singles = (
        LayerKind("all_x_embedder.2-1", 64, h),
        LayerKind("all_final_layer.2-1.linear", h, 64),
        LayerKind("all_final_layer.2-1.adaLN_modulation.1", 256, h),
        LayerKind("t_embedder.mlp.0", 256, 1024),
        LayerKind("t_embedder.mlp.2", 1024, 256),
        LayerKind("cap_embedder.1", text, h),
    )
    fused = {"attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v")}
    renamed = {
        "attention.out": "attention.to_out.0",
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    }
    return Architecture(id, title, "z-image", stacks, singles, fused, renamed)


Z_IMAGE = z_image("z-image", "Z-Image", depth=30, refiners=2, hidden=3840, mlp=10240, text=2560)
