"""The diffusion transformers whose LoRAs we know: every linear layer by name and shape, generated from tables.

Names are those of diffusers' module tree, which DiffSynth and the WebUIs share for these models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class Kind:
    """One linear layer that repeats in every block of a stack: weight [d_out, d_in].

    ``group`` is the head group of the i2L models that write this layer; None where they write nothing.
    """

    name: str
    d_in: int
    d_out: int
    group: int | None = None


@dataclass(frozen=True)
class Stack:
    """``depth`` equal blocks, ``name.0`` … ``name.{depth-1}``, each with the same kinds."""

    name: str
    depth: int
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Module:
    """One linear layer: ``path`` in the model, weight [d_out, d_in]; ``block`` is None outside the stacks."""

    path: str
    kind: Kind
    stack: str | None = None
    block: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.kind.d_out, self.kind.d_in


@dataclass(frozen=True)
class Architecture:
    """A model: its stacks of blocks and its single layers.

    ``family`` names the model class that loads it; ``fused`` maps the name of a fused layer of other
    implementations to the kinds whose rows it stacks; ``renamed`` maps another name to ours; ``caution`` is what
    whoever is told about programs must know first, where none has such a model.
    """

    id: str
    title: str
    family: str
    stacks: tuple[Stack, ...]
    singles: tuple[Kind, ...] = ()
    fused: Mapping[str, tuple[str, ...]] | None = None
    renamed: Mapping[str, str] | None = None
    caution: str = ""

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every linear layer a LoRA may have, by path, in the order of the model."""
        return {module.path: module for module in self._walk()}

    @cached_property
    def made(self) -> dict[str, Module]:
        """The layers that an i2L model writes."""
        return {path: module for path, module in self.modules.items() if module.kind.group is not None}

    def _walk(self) -> Iterator[Module]:
        for kind in self.singles:
            yield Module(kind.name, kind)
        for stack in self.stacks:
            for block in range(stack.depth):
                for kind in stack.kinds:
                    yield Module(f"{stack.name}.{block}.{kind.name}", kind, stack.name, block)


def qwen_image(
    id: str, title: str, *, depth: int, hidden: int, latent: int, text: int, beside: int = 0
) -> Architecture:
    """The class QwenImageTransformer2DModel at any size: ``hidden`` = heads x head size, ``latent`` channels of a
    patch in and out, ``beside`` further channels in, ``text`` width of the prompt's embedding."""
    h = hidden
    kinds = (
        Kind("attn.to_q", h, h, 0),
        Kind("attn.to_k", h, h, 0),
        Kind("attn.to_v", h, h, 0),
        Kind("attn.to_out.0", h, h, 0),
        Kind("attn.add_q_proj", h, h, 2),
        Kind("attn.add_k_proj", h, h, 2),
        Kind("attn.add_v_proj", h, h, 2),
        Kind("attn.to_add_out", h, h, 2),
        Kind("img_mlp.net.0.proj", h, 4 * h),
        Kind("img_mlp.net.2", 4 * h, h, 1),
        Kind("img_mod.1", h, 6 * h, 1),
        Kind("txt_mlp.net.0.proj", h, 4 * h),
        Kind("txt_mlp.net.2", 4 * h, h, 3),
        Kind("txt_mod.1", h, 6 * h, 3),
    )
    singles = (
        Kind("img_in", latent + beside, h),
        Kind("txt_in", text, h),
        Kind("time_text_embed.timestep_embedder.linear_1", 256, h),
        Kind("time_text_embed.timestep_embedder.linear_2", h, h),
        Kind("norm_out.linear", h, 2 * h),
        Kind("proj_out", h, latent),
    )
    return Architecture(id, title, "qwen-image", (Stack("transformer_blocks", depth, kinds),), singles)


def z_image(id: str, title: str, *, depth: int, refiners: int, hidden: int, mlp: int, text: int) -> Architecture:
    """The class ZImageTransformer2DModel at any size: ``depth`` main blocks and ``refiners`` of each refiner."""
    h = hidden
    kinds = (
        Kind("attention.to_q", h, h, 0),
        Kind("attention.to_k", h, h, 0),
        Kind("attention.to_v", h, h, 0),
        Kind("attention.to_out.0", h, h, 0),
        Kind("feed_forward.w1", h, mlp, 1),
        Kind("feed_forward.w2", mlp, h, 1),
        Kind("feed_forward.w3", h, mlp, 1),
    )
    modulated = (*kinds, Kind("adaLN_modulation.0", 256, 4 * h))
    return Architecture(
        id,
        title,
        "z-image",
        (
            Stack("layers", depth, modulated),
            Stack("context_refiner", refiners, kinds),
            Stack("noise_refiner", refiners, modulated),
        ),
        (
            Kind("all_x_embedder.2-1", 64, h),
            Kind("all_final_layer.2-1.linear", h, 64),
            Kind("all_final_layer.2-1.adaLN_modulation.1", 256, h),
            Kind("t_embedder.mlp.0", 256, 1024),
            Kind("t_embedder.mlp.2", 1024, 256),
            Kind("cap_embedder.1", text, h),
        ),
        fused={"attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v")},
        renamed={
            "attention.out": "attention.to_out.0",
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        },
    )


QWEN_IMAGE = qwen_image("qwen-image", "Qwen-Image", depth=60, hidden=3072, latent=64, text=3584)
Z_IMAGE = z_image("z-image", "Z-Image", depth=30, refiners=2, hidden=3840, mlp=10240, text=2560)
MINI = replace(
    qwen_image("mini", "Miniature of Qwen-Image", depth=3, hidden=96, latent=48, text=32, beside=16),
    caution="Test LoRA: only `i2l draw` can use it. Programs for Qwen-Image know its names, not its sizes.",
)

ARCHITECTURES: dict[str, Architecture] = {arch.id: arch for arch in (QWEN_IMAGE, Z_IMAGE, MINI)}
