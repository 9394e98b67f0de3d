"""Z-Image: 30 blocks, and two refiners of two blocks each."""

from __future__ import annotations

from .base import Architecture, LayerKind, LayerStack


def z_image(id: str, title: str, *, depth: int, refiners: int, hidden: int, mlp: int, text: int) -> Architecture:
    """The class ZImageTransformer2DModel at any size.

    ``depth`` main blocks and ``refiners`` blocks of each refiner, of width ``hidden`` and feed-forward width ``mlp``;
    ``text``: width of the prompt's embedding. The first implementation has q, k and v as one layer; Nunchaku besides
    has w3 and w1 as one (its transformer_zimage.py).
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
    native: dict[str, tuple[str, ...]] = {
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    }
    aliases: dict[str, tuple[str, ...]] = {}
    for stack in stacks:
        attention, ff = f"{stack.name}.*.attention", f"{stack.name}.*.feed_forward"
        qkv = (f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v")
        native |= {f"{attention}.qkv": qkv, f"{attention}.out": (f"{attention}.to_out.0",)}
        aliases |= {
            f"{attention}.to_qkv": qkv,
            f"{ff}.net.0.proj": (f"{ff}.w3", f"{ff}.w1"),
            f"{ff}.net.2": (f"{ff}.w2",),
        }
    return Architecture(id, title, "z-image", stacks, singles, native, aliases)


Z_IMAGE = z_image("z-image", "Z-Image", depth=30, refiners=2, hidden=3840, mlp=10240, text=2560)
