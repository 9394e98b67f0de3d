"""Embeddings -> LoRA: the heads of an i2L model, read from disk one at a time and used for all pictures at once.

For each target matrix two small maps without bias or activation: embedding -> compress -> rank x d_in gives down,
embedding -> compress -> rank x d_out gives up. The later kind, ``core`` (arXiv 2606.13809), has a learned pair of
factors a matrix, and one small map, embedding -> compress -> rank x rank, for what stands between them. Some models
add to the middle of all maps what a residual, a sequence of tokens, was compressed to; it is shared by the layers of
a block and group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.checkpoints.structure import check_structure
from i2l_ext.converters.architectures import Architecture, Module
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TORCH_NAMES, Entry
from i2l_ext.converters.lora import Lora, Spec

if TYPE_CHECKING:
    import torch

    from i2l_ext.checkpoints.stream import Run

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


class Heads:
    """An i2L checkpoint, open for use. Its blocks are read in the order of the file, one ahead of the one in use."""

    def __init__(self, path: Path, spec: HeadSpec, run: Run) -> None:
        """Raises UserError where the file is not what ``spec`` says, naming the tensor."""
        from i2l_ext.checkpoints.stream import TensorFiles

        self.spec = spec
        self.files = TensorFiles([path])
        try:
            check_structure(path.name, spec.shapes, self.files.shapes)
            heads = sorted(spec.heads.values(), key=lambda head: self._entry(head).start)
            self.dtype = self._entry(heads[0]).dtype
        except UserError:
            self.close()
            raise
        self.run = replace(run, dtype=TORCH_NAMES[self.dtype])
        self.order = {head.module.path: number for number, head in enumerate(heads)}
        self.blocks: dict[str, dict[str, str]] = {head.block: {} for head in heads}
        for key in sorted(spec.shapes, key=lambda key: self.files.locate(key)[1].start):
            self.blocks[_block_of(key)][key] = key

    def __enter__(self) -> Heads:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.files.close()

    def _entry(self, head: Head) -> Entry:
        return self.files.locate(f"{head.key}.{KINDS[self.spec.kind].mark}")[1]

    def lora(self, embeddings: torch.Tensor, scales: Sequence[float], residual: torch.Tensor | None = None) -> Lora:
        """The LoRA of N pictures, side by side along the rank: the update is the sum of scales_i x update_i.

        ``embeddings`` [N, embed]; ``residual`` [N, length, dim] where the spec has one. The factors have the
        checkpoint's dtype and rank N x rank, and are made when they are asked for. Modules stand in the order of
        the file: asked for in that order, each byte is read once.
        """
        spec, count = self.spec, len(scales)
        if embeddings.shape != (count, spec.embed):
            raise ValueError(f"embeddings {list(embeddings.shape)}, expected {[count, spec.embed]}")
        due = spec.residual and (count, spec.residual.length, spec.residual.dim)
        if due and (residual is None or residual.shape != due):
            raise ValueError(f"{spec.arch.title}: a residual of {list(due)} is due")
        return Lora(
            spec.arch,
            dict.fromkeys(self.order, Spec(spec.rank * count, self.dtype)),
            _Decoder(self, self.run.place(embeddings), scales, self.run.place(residual) if due else None),
        )


class _Decoder:
    """Makes one module's factors after the other, holding the weights of the block at work and no others."""

    def __init__(
        self, heads: Heads, embeddings: torch.Tensor, scales: Sequence[float], residual: torch.Tensor | None
    ) -> None:
        self.heads, self.embeddings, self.scales, self.residual = heads, embeddings, scales, residual
        self.names = list(heads.blocks)
        self.at = -1
        self.walk: Iterator[dict[str, torch.Tensor]] = iter(())
        self.weights: dict[str, torch.Tensor] = {}
        self.middle: torch.Tensor | None = None

    def __call__(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        head, count = self.heads.spec.heads[path], len(self.scales)
        self._go_to(self.names.index(head.block))
        down, up = KINDS[self.heads.spec.kind].factors(self, head)
        scales = down.new_tensor(self.scales).view(count, 1, 1)
        return (down * scales).flatten(0, 1), up.transpose(0, 1).flatten(1)

    def plain(self, key: str) -> torch.Tensor:
        """A tensor of the block at work; it holds until the next block is."""
        return self.weights[key]

    def _go_to(self, number: int) -> None:
        """Have the weights of that block; the next one is on its way already, any other is a new start."""
        from i2l_ext.checkpoints.stream import stream

        if number == self.at:
            return
        if number != self.at + 1 or self.at < 0:
            self.walk = stream(self.heads.files, list(self.heads.blocks.values())[number:], self.heads.run)
        self.at, self.weights = number, next(self.walk)
        self.middle = self._compress(self.names[number])

    def map(self, key: str) -> torch.Tensor:
        """A small map of all embeddings, [N, its width]."""
        x = self.embeddings @ self.weights[f"{key}.proj_in.weight"].T
        if self.middle is not None:
            x = x + self.middle
        return x @ self.weights[f"{key}.proj_out.weight"].T

    def _compress(self, block: str) -> torch.Tensor | None:
        """The residual [N, length, dim] as the block's maps compress it, [N, compress]; None where there is none."""
        if self.residual is None:
            return None
        tokens = (self.residual * RESIDUAL_SCALE) @ self.weights[f"{block}.proj_residual.proj_in.weight"].T
        return tokens.flatten(1) @ self.weights[f"{block}.proj_residual.proj_out.weight"].T


def _block_of(key: str) -> str:
    """The key "layers_lora.blocks.3.layers.0.proj_a.proj_in.weight" lies in the block "layers_lora.blocks.3"."""
    found = re.match(r"(?:\w+_lora\.)?blocks\.\d+", key)
    return found[0] if found else key


@dataclass(frozen=True)
class Kind:
    """A kind of head. ``mark``: the tensor that is in every head. ``tensors``(rank, d_out, d_in): its small maps,
    {name: width}, and its other tensors, {name: shape}. ``factors``: down [N, rank, d_in] and up [N, d_out, rank]."""

    mark: str
    tensors: Callable[[int, int, int], tuple[dict[str, int], dict[str, tuple[int, ...]]]]
    factors: Callable[[_Decoder, Head], tuple[torch.Tensor, torch.Tensor]]


def _direct(made: _Decoder, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    count, rank, (d_out, d_in) = len(made.scales), made.heads.spec.rank, head.module.shape
    down = made.map(f"{head.key}.proj_a").view(count, rank, d_in)
    return down, made.map(f"{head.key}.proj_b").view(count, d_out, rank)


def _core(made: _Decoder, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    count, rank = len(made.scales), made.heads.spec.rank
    core = made.map(f"{head.key}.core").view(count, rank, rank)
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
