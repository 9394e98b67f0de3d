"""Embeddings -> LoRA: the heads of an i2L model, read from disk one at a time and used for all pictures at once.

The heads are thousands of small matrices, each used once. So they are used where they are read, on the processor: a
graphics card would only wait for them. Several threads each read one and use it while it is still in the processor's
cache; they are a few blocks ahead of whoever asks.

For each target matrix two small maps without bias or activation: embedding -> compress -> rank x d_in gives down,
embedding -> compress -> rank x d_out gives up. The later kind, ``core`` (arXiv 2606.13809), has a learned pair of
factors a matrix, and one small map, embedding -> compress -> rank x rank, for what stands between them. Some models
add to the middle of all maps what a residual, a sequence of tokens, was compressed to; it is shared by the layers of
a block and group.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from i2l_ext.converters.architectures import Architecture, Module
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TORCH_NAMES, TensorInfo
from i2l_ext.converters.lora import FactorSpec, Lora
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks, ComputeOptions
from i2l_ext.weights.structure import check_structure

if TYPE_CHECKING:
    import torch

    from i2l_ext.converters.lora import Pair

RESIDUAL_SCALE = 0.05
"""The residual's factor before its first map: part of the model as it was trained, not a choice."""


WORKERS = 8
"""Threads at most: with more, the memory they read from is the bound."""

WIDENED = {"F8_E4M3": "BF16", "F8_E5M2": "BF16"}
"""Formats of files that no processor multiplies, and what they are computed in, which holds each of their numbers."""


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
    """An i2L checkpoint, open for use. Its blocks are read in the order of the file, a few ahead of the one in use."""

    def __init__(self, path: Path, spec: HeadSpec, callbacks: Callbacks = NO_CALLBACKS) -> None:
        """Raises UserError where the file is not what ``spec`` says, or holds no floats, naming the tensor."""
        from i2l_ext.weights.stream import TensorFiles

        self.spec = spec
        self.files = TensorFiles([path])
        try:
            check_structure(path.name, spec.shapes, self.files.shapes)
            self.files.check(spec.shapes)
            heads = sorted(spec.heads.values(), key=lambda head: self._entry(head).start)
            stored = self._entry(heads[0]).dtype
        except UserError:
            self.files.close()
            raise
        self.dtype = WIDENED.get(stored, stored)
        self.options, self.callbacks = ComputeOptions("cpu", TORCH_NAMES[self.dtype]), callbacks
        self.order = {head.module.path: number for number, head in enumerate(heads)}
        self.blocks: dict[str, list[Head]] = {}
        for head in heads:
            self.blocks.setdefault(head.block, []).append(head)
        self.groups: dict[str, dict[str, str]] = {}
        for key in spec.shapes:
            self.groups.setdefault(_owner_of(key), {})[key] = key
        self.workers = _Workers(self)

    def __enter__(self) -> Heads:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.workers.close()
        self.files.close()

    def _entry(self, head: Head) -> TensorInfo:
        return self.files.locate(f"{head.key}.{KINDS[self.spec.kind].mark}")[1]

    def lora(self, embeddings: torch.Tensor, scales: Sequence[float], residual: torch.Tensor | None = None) -> Lora:
        """The LoRA of N pictures, side by side along the rank: the update is the sum of scales_i x update_i.

        ``embeddings`` [N, embed]; ``residual`` [N, length, dim] where the spec has one. The factors have the
        checkpoint's dtype (bfloat16 where that is an fp8) and rank N x rank, and are made when they are asked for.
        Modules stand in the order of the file: asked for in that order, each byte is read once.
        """
        spec, count = self.spec, len(scales)
        if embeddings.shape != (count, spec.embed):
            raise ValueError(f"embeddings {list(embeddings.shape)}, expected {[count, spec.embed]}")
        due = spec.residual and (count, spec.residual.length, spec.residual.dim)
        if due and (residual is None or residual.shape != due):
            raise ValueError(f"{spec.arch.title}: a residual of {list(due)} is due")
        seen = self.options.place(embeddings)
        sight = Sight(seen, seen.new_tensor(scales), self.options.place(residual) * RESIDUAL_SCALE if due else None)
        return Lora(
            spec.arch,
            dict.fromkeys(self.order, FactorSpec(spec.rank * count, self.dtype)),
            _Decoder(self.workers, sight),
        )


@dataclass(frozen=True)
class Sight:
    """N pictures as the maps take them: embeddings [N, embed], the factors of their updates [N], and where the model
    has one their residual [N, length, dim], scaled."""

    embeddings: torch.Tensor
    scales: torch.Tensor
    residual: torch.Tensor | None


class _Workers:
    """Threads that read blocks and use them, each on one processor with a buffer of its own."""

    def __init__(self, heads: Heads) -> None:
        import torch

        from i2l_ext.weights.stream import Loader

        self.heads, self.loader = heads, Loader(heads.files, heads.options)
        everywhere = torch.get_num_threads()
        self.count = min(WORKERS, everywhere)
        self.size = max(map(self.loader.nbytes, heads.groups.values()))
        self.buffers: deque[torch.Tensor] = deque()
        self.pool = ThreadPoolExecutor(self.count, "i2l-decode", _on_one_processor, (everywhere,))

    def close(self) -> None:
        self.loader.stop.set()
        self.pool.shutdown(cancel_futures=True)

    def make(self, block: str, sight: Sight) -> dict[str, Pair]:
        """The factors of a block's modules. On a worker's thread."""
        heads = self.heads
        try:
            buffer = self.buffers.pop()
        except IndexError:  # each thread's first block
            buffer = self.loader.buffer(self.size)
        middle = None
        if sight.residual is not None:
            weights = self.loader.read(heads.groups[block], buffer)
            tokens = sight.residual @ weights[f"{block}.proj_residual.proj_in.weight"].T
            middle = tokens.flatten(1) @ weights[f"{block}.proj_residual.proj_out.weight"].T
        made = self._room(heads.blocks[block], sight.embeddings)
        for head in heads.blocks[block]:
            maps = Maps(self.loader.read(heads.groups[head.key], buffer), sight, middle)
            KINDS[heads.spec.kind].write(maps, head, heads.spec.rank, *made[head.module.path])
        self.buffers.append(buffer)
        return made

    def _room(self, heads: Sequence[Head], like: torch.Tensor) -> dict[str, Pair]:
        """Where the factors of a block go: down [N x rank, d_in] and up [d_out, N x rank], uninitialised, in one piece
        of memory. To fetch it from the system in small ones takes as long as a third of the arithmetic."""
        rank = len(like) * self.heads.spec.rank
        pairs = [((rank, d_in), (d_out, rank)) for d_out, d_in in (head.module.shape for head in heads)]
        shapes = [shape for pair in pairs for shape in pair]
        parts = like.new_empty(sum(map(math.prod, shapes))).split([*map(math.prod, shapes)])
        views = iter([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
        return {head.module.path: (next(views), next(views)) for head in heads}


def _on_one_processor(others: int) -> None:
    """Have torch use one processor on this thread, and ``others`` on those to come as before.

    The number that is set holds for the thread that sets it and for all that start later; so it is put back on a
    thread that does nothing else.
    """
    import torch

    torch.get_num_threads()  # else a thread's first operation sets it anew
    torch.set_num_threads(1)
    restore = Thread(target=torch.set_num_threads, args=(others,))
    restore.start()
    restore.join()


class _Decoder:
    """Hands out modules' factors, and holds those of the block at work and of a few to come."""

    def __init__(self, workers: _Workers, sight: Sight) -> None:
        self.workers, self.sight = workers, sight
        self.names = list(workers.heads.blocks)
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.at = -1
        self.made: dict[str, Pair] = {}
        self.next = 0
        self.coming: deque[tuple[int, Future[dict[str, Pair]]]] = deque()

    def __call__(self, path: str) -> Pair:
        number = self.numbers[self.workers.heads.spec.heads[path].block]
        if number != self.at:
            self._go_to(number)
        return self.made[path]

    def _go_to(self, number: int) -> None:
        """Have the factors of that block; it is on its way already, unless it is one long before or behind."""
        from i2l_ext.weights.stream import outcome

        while self.coming and self.coming[0][0] != number:
            self.coming.popleft()[1].cancel()
        if not self.coming:
            self.next = number
        while self.next < len(self.names) and len(self.coming) <= 2 * self.workers.count:
            job = self.workers.pool.submit(self.workers.make, self.names[self.next], self.sight)
            self.coming.append((self.next, job))
            self.next += 1
        self.at, job = self.coming.popleft()
        [self.made] = outcome([job], self.workers.heads.callbacks)


def _owner_of(key: str) -> str:
    """Whose the tensor is: "layers_lora.blocks.3.layers.0.proj_a.proj_in.weight" is of the head
    "layers_lora.blocks.3.layers.0", "blocks.3.proj_residual.proj_in.weight" of the block "blocks.3"."""
    found = re.match(r"(?:\w+_lora\.)?blocks\.\d+(?:\.layers\.\d+)?", key)
    return found[0] if found else key


@dataclass(frozen=True)
class Maps:
    """The weights of a head, and what goes in: ``middle`` [N, compress] is added between the two maps."""

    weights: Mapping[str, torch.Tensor]
    sight: Sight
    middle: torch.Tensor | None

    def __call__(self, key: str, *, scaled: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
        """A small map of all embeddings, [N, its width], to ``out``; ``scaled`` by the factors of their updates."""
        x = linear(self.sight.embeddings, self.weights[f"{key}.proj_in.weight"])
        if self.middle is not None:
            x = x + self.middle
        if scaled:
            x = x * self.sight.scales[:, None]
        return linear(x, self.weights[f"{key}.proj_out.weight"], out)


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [N, inputs] to ``out`` [N, outputs]."""
    import torch

    return torch.mm(x, weight.T, out=out)


def _columns(up: torch.Tensor, out: torch.Tensor) -> None:
    """[N, d_out, rank] to ``out`` [d_out, N x rank]. The numbers of a row go as one where there is a type as wide."""
    import torch

    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(up.shape[2] * up.itemsize)
    if wide is None or not up.is_contiguous():
        out.view(len(out), len(up), -1).copy_(up.transpose(0, 1))
    else:  # written this way round, torch does not take it for a transposition, at which it is slower
        out.view(wide).T.copy_(up.view(wide)[:, :, 0])


@dataclass(frozen=True)
class Kind:
    """A kind of head. ``mark``: the tensor that is in every head. ``tensors``(rank, d_out, d_in): its small maps,
    {name: width}, and its other tensors, {name: shape}. ``write``(maps, head, rank, down, up): the factors, to
    down [N x rank, d_in], which carries the scales, and up [d_out, N x rank]."""

    mark: str
    tensors: Callable[[int, int, int], tuple[dict[str, int], dict[str, tuple[int, ...]]]]
    write: Callable[[Maps, Head, int, torch.Tensor, torch.Tensor], None]


def _direct(maps: Maps, head: Head, rank: int, down: torch.Tensor, up: torch.Tensor) -> None:
    d_out, d_in = head.module.shape
    maps(f"{head.key}.proj_a", scaled=True, out=down.view(-1, rank * d_in))
    _columns(maps(f"{head.key}.proj_b").view(-1, d_out, rank), up)


def _core(maps: Maps, head: Head, rank: int, down: torch.Tensor, up: torch.Tensor) -> None:
    import torch

    core, down = maps(f"{head.key}.core").view(-1, rank, rank), down.view(-1, rank, head.module.shape[1])
    torch.mul(maps.weights[f"{head.key}.query_a"], maps.sight.scales[:, None, None], out=down)
    _columns(maps.weights[f"{head.key}.query_b"] @ core, up)


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
