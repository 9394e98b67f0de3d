"""Embeddings -> LoRA: heads are read from disk one at a time, and each is used for all pictures at once.

The heads are thousands of small matrices, each used once. Copying them to a graphics card would take longer than the
arithmetic, so they are used on the processor, where they are read. Several threads each read a head and use it while
it is still in the processor's cache. They work a few blocks ahead of the caller.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TORCH_NAMES, TensorInfo
from i2l_ext.converters.lora import FactorSpec, Lora
from i2l_ext.decoder.kinds import HEAD_KINDS, DecoderInput, HeadProjector
from i2l_ext.decoder.spec import RESIDUAL_SCALE, DecoderSpec, HeadSpec
from i2l_ext.decoder.transformer import written_vectors
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks, ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.stream import TensorLoader, results_of
from i2l_ext.weights.structure import check_structure
from i2l_ext.weights.threads import worker_threads

if TYPE_CHECKING:
    from i2l_ext.converters.lora import Pair

MAX_THREADS = 8
"""More do not help: then memory bandwidth is the limit."""

WIDENED = {"F8_E4M3": "BF16", "F8_E5M2": "BF16", "I8": "BF16"}
"""Formats of one byte, packed ones among them -> the format they are computed in. It holds each of their numbers."""


class Decoder:
    """An i2L checkpoint, open for use. Close it, or use it in a ``with``."""

    def __init__(
        self, path: Path, spec: DecoderSpec, callbacks: Callbacks = NO_CALLBACKS, dtype: str | None = None
    ) -> None:
        """``dtype``, by safetensors' name: in which to compute; None: that of the file, bfloat16 for a packed one or
        an fp8. Raises UserError where the file does not match ``spec`` or does not hold floats; it names the tensor."""
        self.spec, self.callbacks, self.kind = spec, callbacks, HEAD_KINDS[spec.kind]
        self.files = TensorFiles([path])
        try:
            check_structure(path.name, spec.shapes, self.files.shapes)
            self.files.check(spec.shapes)
            heads = sorted(spec.heads.values(), key=lambda head: self._marker(head).start)
            stored = self._marker(heads[0]).dtype
        except UserError:
            self.files.close()
            raise
        self.dtype = dtype or WIDENED.get(stored, stored)
        self.options = ComputeOptions("cpu", TORCH_NAMES[self.dtype])
        self.blocks: dict[str, list[HeadSpec]] = {}
        """The heads of each block, blocks and heads in the order of the file."""
        for head in heads:
            self.blocks.setdefault(head.block, []).append(head)
        self.paths = [head.module.path for head in heads]
        self.workers = _Workers(self)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.workers.close()
        self.files.close()

    def _marker(self, head: HeadSpec) -> TensorInfo:
        return self.files.locate(f"{head.key}.{self.kind.marker}")[1]

    def lora(self, embeddings: torch.Tensor, scales: Sequence[float], residual: torch.Tensor | None = None) -> Lora:
        """The LoRA of N pictures, side by side along the rank: the update is the sum of scales_i x update_i.

        ``embeddings`` [N, embed]; ``residual`` [N, length, dim] where the spec has one. The factors have the
        dtype of the decoder and rank N x rank, and are made when they are asked for. The modules
        are in the order of the file; asked for in that order, each byte is read once.

        Where the spec has a transformer, ``embeddings`` are patch tokens [N, T, token], and the factors have the rank
        of one picture. The update is scaled by the sum of the scales. Their ratios say how much each picture counts
        in the attention (``transformer.picture_bias``).
        """
        spec, count = self.spec, len(scales)
        what, width = spec.takes
        if embeddings.ndim != 2 + spec.sees_together or (len(embeddings), embeddings.shape[-1]) != (count, width):
            raise ValueError(f"{what} {list(embeddings.shape)}, expected {count} of width {width}")
        expected = spec.residual and (count, spec.residual.length, spec.residual.dim)
        if expected and (residual is None or residual.shape != expected):
            raise ValueError(f"{spec.arch.title}: a residual of {list(expected)} is needed")
        placed = self.options.place(embeddings)
        scaled = self.options.place(residual) * RESIDUAL_SCALE if expected else None

        def inputs() -> DecoderInput:
            if not spec.sees_together:
                return DecoderInput(placed, placed.new_tensor(scales), scaled)
            strength = math.fsum(scales)
            shares = [scale / strength for scale in scales]
            written = written_vectors(self.files, spec, placed, shares, self.options, self.callbacks)
            return DecoderInput(placed, placed.new_tensor([strength]), None, written)

        specs = dict.fromkeys(self.paths, FactorSpec(spec.rank * (1 if spec.sees_together else count), self.dtype))
        return Lora(spec.arch, specs, _FactorLoader(self, inputs))


class _Workers:
    """Threads that read blocks and compute their factors, each on one processor with a buffer of its own."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.loader = decoder, TensorLoader(decoder.files, decoder.options)
        self.names = {owner: {key: key for key in shapes} for owner, shapes in decoder.spec.tensors.items()}
        self.count = min(MAX_THREADS, torch.get_num_threads())
        self.size = max(map(self.loader.nbytes, self.names.values()))
        self.buffers: deque[torch.Tensor] = deque()
        self.pool = worker_threads("i2l-decode", self.count)

    def close(self) -> None:
        self.loader.stop.set()
        self.pool.shutdown(cancel_futures=True)

    def make(self, block: str, inputs: DecoderInput) -> dict[str, Pair]:
        """The factors of a block's modules, by path. Called on a worker's thread."""
        heads, kind, rank = self.decoder.blocks[block], self.decoder.kind, self.decoder.spec.rank
        try:
            buffer = self.buffers.pop()
        except IndexError:  # each thread's first block
            buffer = self.loader.buffer(self.size)
        middle = None
        if inputs.residual is not None:
            weights = self.loader.read(self.names[block], buffer)
            tokens = inputs.residual @ weights[f"{block}.proj_residual.proj_in.weight"].T
            middle = tokens.flatten(1) @ weights[f"{block}.proj_residual.proj_out.weight"].T
        factors = _empty_factors(heads, len(inputs.scales) * rank, inputs.scales)
        for head in heads:
            projector = HeadProjector(self.loader.read(self.names[head.key], buffer), inputs, middle)
            kind.write(projector, head.key, rank, *factors[head.module.path])
        self.buffers.append(buffer)
        return factors


def _empty_factors(heads: Sequence[HeadSpec], rank: int, like: torch.Tensor) -> dict[str, Pair]:
    """Uninitialised down [rank, d_in] and up [d_out, rank] of each module, in one piece of memory: to get them from
    the system one by one takes a third as long as the arithmetic."""
    shapes = [shape for d_out, d_in in (head.module.shape for head in heads) for shape in ((rank, d_in), (d_out, rank))]
    sizes = [math.prod(shape) for shape in shapes]
    parts = like.new_empty(sum(sizes)).split(sizes)
    views = iter([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
    return {head.module.path: (next(views), next(views)) for head in heads}


class _FactorLoader:
    """Gives a module's factors by its path. It holds those of one block; a few more are being made.

    A LoRA is written by looking modules up, and a selection skips some. So blocks are looked up here too, and not
    walked: an iterator would need a second class that drives it, and could not skip what is already on its way.
    """

    def __init__(self, decoder: Decoder, make_inputs: Callable[[], DecoderInput]) -> None:
        self.decoder, self.make_inputs = decoder, make_inputs
        self.blocks = list(decoder.blocks)
        self.numbers = {block: number for number, block in enumerate(self.blocks)}
        self.current = -1
        self.factors: dict[str, Pair] = {}
        self.next = 0
        self.coming: deque[tuple[int, Future[dict[str, Pair]]]] = deque()

    @cached_property
    def inputs(self) -> DecoderInput:
        """Made when the first factor is asked for."""
        return self.make_inputs()

    def __call__(self, path: str) -> Pair:
        number = self.numbers[self.decoder.spec.heads[path].block]
        if number != self.current:
            self._go_to(number)
        return self.factors[path]

    def _go_to(self, number: int) -> None:
        """Have the factors of a block. It is being made already, unless it is behind or far ahead."""
        workers = self.decoder.workers
        while self.coming and self.coming[0][0] != number:
            self.coming.popleft()[1].cancel()
        if not self.coming:
            self.next = number
        while self.next < len(self.blocks) and len(self.coming) <= 2 * workers.count:
            future = workers.pool.submit(workers.make, self.blocks[self.next], self.inputs)
            self.coming.append((self.next, future))
            self.next += 1
        self.current, future = self.coming.popleft()
        [self.factors] = results_of([future], self.decoder.callbacks)
