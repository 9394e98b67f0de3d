"""Embeddings -> LoRA: the heads of an i2L model, read from disk one at a time and used for all pictures at once.

For each target matrix two small maps without bias or activation: embedding -> compress -> rank x d_in gives down,
embedding -> compress -> rank x d_out gives up. The later kind, ``core`` (arXiv 2606.13809), has a learned pair of
factors a matrix, and one small map, embedding -> compress -> rank x rank, for what stands between them. Some models
add to the middle of all maps what a residual, a sequence of tokens, was compressed to; it is shared by the layers of
a block and group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from i2l_ext.converters.architectures import Architecture, Module
from i2l_ext.converters.files import TensorFile
from i2l_ext.converters.lora import Lora, Spec

if TYPE_CHECKING:
    import torch

RESIDUAL_SCALE = 0.05
"""The residual's factor before its first map: part of the model as it was trained, not a choice."""


@dataclass(frozen=True)
class Residual:
    """The sequence that refines a head: ``length`` tokens of width ``dim``, each mapped to ``mid``."""

    length: int
    dim: int
    mid: int


@dataclass(frozen=True)
class Head:
    """The pair of maps that writes one module; ``block`` is the key of what its group shares."""

    module: Module
    key: str
    block: str


@dataclass(frozen=True)
class HeadSpec:
    """An i2L model by its dimensions: which architecture it writes for, from embeddings of which width."""

    arch: Architecture
    embed: int
    compress: int
    rank: int = 4
    residual: Residual | None = None
    kind: str = "direct"

    @cached_property
    def heads(self) -> dict[str, Head]:
        """By module path. A stack's heads are ordered by group, then by block, then as the layers stand."""
        return {head.module.path: head for head in self._heads()}

    def _heads(self) -> Iterator[Head]:
        for stack in self.arch.stacks:
            prefix = "" if len(self.arch.stacks) == 1 else f"{stack.name}_lora."
            made = sorted((kind for kind in stack.kinds if kind.group is not None), key=lambda kind: kind.group or 0)
            for group, kinds in groupby(made, key=lambda kind: kind.group or 0):
                names = [kind.name for kind in kinds]
                for number in range(stack.depth):
                    block = f"{prefix}blocks.{group * stack.depth + number}"
                    for layer, name in enumerate(names):
                        module = self.arch.modules[f"{stack.name}.{number}.{name}"]
                        yield Head(module, f"{block}.layers.{layer}", block)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, {key: shape}."""
        shapes: dict[str, tuple[int, ...]] = {}
        for head in self.heads.values():
            maps, factors = KINDS[self.kind].tensors(self.rank, *head.module.shape)
            shapes |= {f"{head.key}.{name}": shape for name, shape in factors.items()}
            for name, width in maps.items():
                shapes[f"{head.key}.{name}.proj_in.weight"] = (self.compress, self.embed)
                shapes[f"{head.key}.{name}.proj_out.weight"] = (width, self.compress)
            if self.residual:
                length, dim, mid = self.residual.length, self.residual.dim, self.residual.mid
                shapes[f"{head.block}.proj_residual.proj_in.weight"] = (mid, dim)
                shapes[f"{head.block}.proj_residual.proj_out.weight"] = (self.compress, length * mid)
        return shapes


def decode(
    file: TensorFile,
    spec: HeadSpec,
    embeddings: torch.Tensor,
    scales: Sequence[float],
    residual: torch.Tensor | None = None,
) -> Lora:
    """The LoRA of N pictures, side by side along the rank: the update is the sum of scales_i x update_i.

    ``file`` is the checkpoint, already held against ``spec.shapes``; ``embeddings`` [N, embed]; ``residual``
    [N, length, dim] where the spec has one. The factors have the checkpoint's dtype and rank N x rank. Each head is
    read when its module is asked for; modules stand in the order of the file, which slow disks like.
    """
    count = len(scales)
    if embeddings.shape != (count, spec.embed):
        raise ValueError(f"embeddings {list(embeddings.shape)}, expected {[count, spec.embed]}")
    if spec.residual and (residual is None or residual.shape != (count, spec.residual.length, spec.residual.dim)):
        raise ValueError(f"{spec.arch.title}: a residual of {[count, spec.residual.length, spec.residual.dim]} is due")
    tensors = file.header.tensors
    mark = KINDS[spec.kind].mark
    heads = sorted(spec.heads.values(), key=lambda head: tensors[f"{head.key}.{mark}"].start)
    dtype = tensors[f"{heads[0].key}.{mark}"].dtype
    specs: Mapping[str, Spec] = {head.module.path: Spec(spec.rank * count, dtype) for head in heads}
    return Lora(spec.arch, specs, _Decoder(file, spec, embeddings, scales, residual))


class _Decoder:
    """Makes one module's factors from its head; remembers the compressed residual of the last block it saw."""

    def __init__(
        self,
        file: TensorFile,
        spec: HeadSpec,
        embeddings: torch.Tensor,
        scales: Sequence[float],
        residual: torch.Tensor | None,
    ) -> None:
        self.file, self.spec, self.embeddings, self.scales, self.residual = file, spec, embeddings, scales, residual
        self.shared: tuple[str, torch.Tensor | None] = ("", None)

    def __call__(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        head, count = self.spec.heads[path], len(self.scales)
        down, up = KINDS[self.spec.kind].factors(self, head, self._middle(head.block))
        scales = down.new_tensor(self.scales).view(count, 1, 1)
        return (down * scales).flatten(0, 1), up.transpose(0, 1).flatten(1)

    def _weight(self, key: str) -> torch.Tensor:
        return self.plain(f"{key}.weight")

    def plain(self, key: str) -> torch.Tensor:
        """A tensor of the file, where the embeddings are."""
        return self.file.tensor(key).to(self.embeddings.device)

    def map(self, key: str, middle: torch.Tensor | None) -> torch.Tensor:
        """A small map of all embeddings: [N, its width]."""
        weight = self._weight(f"{key}.proj_in")
        x = self.embeddings.to(weight.dtype) @ weight.T
        if middle is not None:
            x = x + middle
        return x @ self._weight(f"{key}.proj_out").T

    def _middle(self, block: str) -> torch.Tensor | None:
        """The residual [N, length, dim] compressed to [N, compress] by the block's maps, or None."""
        if self.residual is None or self.spec.residual is None:
            return None
        if self.shared[0] != block:
            weight = self._weight(f"{block}.proj_residual.proj_in")
            tokens = (self.residual.to(weight.dtype) * RESIDUAL_SCALE) @ weight.T
            flat = tokens.reshape(len(self.scales), -1)
            self.shared = block, flat @ self._weight(f"{block}.proj_residual.proj_out").T
        return self.shared[1]


@dataclass(frozen=True)
class Kind:
    """A kind of head. ``mark``: the tensor that is in every head. ``tensors``(rank, d_out, d_in): its small maps,
    {name: width}, and its other tensors, {name: shape}. ``factors``: down [N, rank, d_in] and up [N, d_out, rank]."""

    mark: str
    tensors: Callable[[int, int, int], tuple[dict[str, int], dict[str, tuple[int, ...]]]]
    factors: Callable[[_Decoder, Head, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


def _direct(made: _Decoder, head: Head, middle: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    count, rank, (d_out, d_in) = len(made.scales), made.spec.rank, head.module.shape
    down = made.map(f"{head.key}.proj_a", middle).view(count, rank, d_in)
    return down, made.map(f"{head.key}.proj_b", middle).view(count, d_out, rank)


def _core(made: _Decoder, head: Head, middle: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    count, rank = len(made.scales), made.spec.rank
    core = made.map(f"{head.key}.core", middle).view(count, rank, rank)
    return made.plain(f"{head.key}.query_a").expand(count, -1, -1), made.plain(f"{head.key}.query_b") @ core


KINDS = {
    "direct": Kind(
        "proj_a.proj_in.weight",
        lambda rank, d_out, d_in: ({"proj_a": rank * d_in, "proj_b": rank * d_out}, {}),
        _direct,
    ),
    "core": Kind(
        "query_a",
        lambda rank, d_out, d_in: ({"core": rank * rank}, {"query_a": (rank, d_in), "query_b": (d_out, rank)}),
        _core,
    ),
}
