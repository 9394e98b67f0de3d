"""What a decoder is made of: its heads by module, and the shape of every tensor. Importing this does not import torch,
so that a WebUI's own process can read the catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product

from i2l_ext.converters.architectures import ARCHITECTURES, Architecture, Module
from i2l_ext.decoder.kinds import HEAD_KINDS, Shapes

RESIDUAL_SCALE = 0.05
"""The factor on the residual's tokens. The published models were trained with it."""


@dataclass(frozen=True)
class ResidualSpec:
    """The sequence that refines the heads: ``length`` tokens of width ``dim``, each mapped to ``mid`` numbers. It is
    compressed to one vector for each block and group, which is added in the middle of all maps of their heads."""

    length: int
    dim: int
    mid: int


@dataclass(frozen=True)
class HeadSpec:
    """The head that writes the factors of one module. ``key`` is the start of its tensors' names, ``block`` that of
    the tensors that its block and group share."""

    module: Module
    key: str
    block: str


@dataclass(frozen=True)
class DecoderSpec:
    """The dimensions of a decoder: the architecture it writes for, and the width of the embeddings it takes. ``kind``
    is one of HEAD_KINDS. ``compress``: the width in the middle of its maps; 0 where the kind has none."""

    arch: Architecture
    embed: int
    compress: int
    rank: int = 4
    residual: ResidualSpec | None = None
    kind: str = "direct"

    @cached_property
    def heads(self) -> dict[str, HeadSpec]:
        """By module path. The heads of a stack are ordered by group, then by block, then by layer."""
        return {head.module.path: head for head in self._heads()}

    def _heads(self) -> Iterator[HeadSpec]:
        for stack in self.arch.stacks:
            prefix = "" if len(self.arch.stacks) == 1 else f"{stack.name}_lora."
            made = sorted((kind for kind in stack.kinds if kind.group is not None), key=lambda kind: kind.group or 0)
            for group, kinds in groupby(made, key=lambda kind: kind.group or 0):
                names = [kind.name for kind in kinds]
                for number in range(stack.depth):
                    block = f"{prefix}blocks.{group * stack.depth + number}"
                    for layer, name in enumerate(names):
                        module = self.arch.modules[f"{stack.name}.{number}.{name}"]
                        yield HeadSpec(module, self._key(module, block, layer), block)

    def _key(self, module: Module, block: str, layer: int) -> str:
        if HEAD_KINDS[self.kind].by_path:
            return f"module_dict.{module.path.replace('.', '___')}"
        return f"{block}.layers.{layer}"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, {key: shape}."""
        return {key: shape for shapes in self.tensors.values() for key, shape in shapes.items()}

    @cached_property
    def tensors(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """{key: shape} of the tensors of each head, by ``HeadSpec.key``, and of those that the heads of a block and
        group share, by ``HeadSpec.block``."""
        tensors: dict[str, dict[str, tuple[int, ...]]] = {}
        for head in self.heads.values():
            maps, others = HEAD_KINDS[self.kind].layout(self.rank, *head.module.shape, self.embed)
            own = tensors[head.key] = {f"{head.key}.{name}": shape for name, shape in others.items()}
            for name, width in maps.items():
                own[f"{head.key}.{name}.proj_in.weight"] = (self.compress, self.embed)
                own[f"{head.key}.{name}.proj_out.weight"] = (width, self.compress)
            if self.residual:
                length, dim, mid = self.residual.length, self.residual.dim, self.residual.mid
                tensors[head.block] = {
                    f"{head.block}.proj_residual.proj_in.weight": (mid, dim),
                    f"{head.block}.proj_residual.proj_out.weight": (self.compress, length * mid),
                }
        return tensors


def spec_of(shapes: Shapes) -> DecoderSpec | None:
    """The decoder whose checkpoint has exactly these tensors, {key: shape}; None where it is of no known kind, or for
    no architecture that i2L models write."""
    for arch, kind in product(ARCHITECTURES.values(), HEAD_KINDS):
        if not arch.i2l_modules:
            continue
        first = next(iter(DecoderSpec(arch, 1, 1, kind=kind).heads.values()))
        own = {key.removeprefix(first.key + "."): shape for key, shape in shapes.items() if key.startswith(first.key)}
        try:
            embed, compress, rank = HEAD_KINDS[kind].measure(own, first.module.shape[1])
            spec = DecoderSpec(arch, embed, compress, rank, _residual_of(shapes, first.block), kind)
        except (LookupError, TypeError, ValueError, ZeroDivisionError):
            continue
        if rank and spec.shapes == shapes:
            return spec
    return None


def _residual_of(shapes: Shapes, block: str) -> ResidualSpec | None:
    mid, dim = shapes.get(f"{block}.proj_residual.proj_in.weight", (0, 0))
    return ResidualSpec(shapes[f"{block}.proj_residual.proj_out.weight"][1] // mid, dim, mid) if mid else None
