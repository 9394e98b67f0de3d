"""Tensors in memory as their files have them, and linear layers that multiply by them.

On a processor, a matrix of other numbers than are computed with gets the right ones a few rows at a time, and these are
multiplied while they are in the processor's cache. So the wide matrix is never in memory, and is not written there and
read again: a layer takes less time than with wide matrices that were there before (`benchmarks/encode.py`). Each thread
takes the next rows when it is done with its own: none waits for another that the system has put aside.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from i2l_ext.weights.packed_numbers import unpack
from i2l_ext.weights.threads import worker_threads

PIECE = 1 << 20
"""Numbers of a matrix that a thread makes and multiplies at a time, at most: 4 MB in float32."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of ``shape`` whose numbers, of ``dtype``, are the bytes ``raw``, uint8 [nbytes]. A packed one has
    ``scales``, each for ``group`` numbers."""

    raw: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    scales: StoredTensor | None = None
    group: int = 0

    def numbers(self, first: int, count: int) -> Tensor:
        """Some of the numbers, [count], as they are stored, from number ``first`` on. A view of the bytes; a copy where
        torch cannot take them for numbers, as they do not start at a multiple of a number's size."""
        size = self.dtype.itemsize
        raw = self.raw[first * size : (first + count) * size]
        return (raw.clone() if raw.data_ptr() % size else raw).view(self.dtype)

    def fill(self, out: Tensor, first: int = 0) -> None:
        """Put numbers from ``first`` on into ``out`` [count], floats of any dtype, multiplied by their scales."""
        found = self.numbers(first, len(out))
        if self.scales or self.dtype.itemsize == 1:
            scales = self.scales.numbers(0, math.prod(self.scales.shape)) if self.scales else None
            unpack(found, scales, self.group, first, out)
        else:
            out.copy_(found)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All of it in ``dtype``. Where that is the dtype of the bytes it is a view of them, so it may be made before
        they are read; but a copy, made now, where they do not start at a multiple of a number's size."""
        count = math.prod(self.shape)
        if self.dtype == dtype:
            return self.numbers(0, count).view(self.shape)
        out = torch.empty(count, dtype=dtype)
        self.fill(out)
        return out.view(self.shape)


class StoredWeights:
    """Lets layers compute in ``dtype`` with weights as their files have them."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Close it after use."""
        self.dtype = dtype
        self.threads = torch.get_num_threads()
        self.pool = worker_threads("i2l-multiply", self.threads)
        self.pieces: deque[Tensor] = deque()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    @contextmanager
    def given_to(self, layer: nn.Module, tensors: Mapping[str, StoredTensor]) -> Iterator[None]:
        """``layer`` has ``tensors``, by parameter, as its weights. The matrices of its linear layers stay as they are;
        everything else, which is small, gets the dtype. At the end the layer has no weights any more."""
        linear = {
            f"{name}.weight".removeprefix("."): module  # the layer itself has no name
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        kept = {name for name, one in tensors.items() if name in linear and one.dtype != self.dtype}
        whole = {name: one.whole(self.dtype) for name, one in tensors.items() if name not in kept}
        layer.load_state_dict(whole, assign=True, strict=False)
        for name in kept:
            vars(linear[name])["forward"] = partial(self.multiply, tensors[name], linear[name].bias)
        try:
            yield
        finally:
            for name in kept:
                del vars(linear[name])["forward"]  # its class has the plain one
            layer.to("meta")

    def multiply(self, matrix: StoredTensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """torch's ``linear``: x [..., d_in] and a matrix [d_out, d_in] to [..., d_out]."""
        d_out, d_in = matrix.shape
        rounds = -(-d_out * d_in // (PIECE * self.threads))
        rows = -(-d_out // (rounds * self.threads))  # as many pieces for each thread
        flat = x.reshape(-1, d_in)
        out = flat.new_empty(len(flat), d_out)
        jobs = [
            self.pool.submit(self._multiply_rows, matrix, bias, flat, out, slice(first, min(first + rows, d_out)))
            for first in range(0, d_out, rows)
        ]
        for job in jobs:
            job.result()
        return out.view(*x.shape[:-1], d_out)

    @torch.no_grad()
    def _multiply_rows(self, matrix: StoredTensor, bias: Tensor | None, x: Tensor, out: Tensor, rows: slice) -> None:
        """Fill the columns of ``out`` that come of some rows of the matrix."""
        count, d_in = rows.stop - rows.start, matrix.shape[1]
        try:
            room = self.pieces.popleft()
        except IndexError:  # each thread's first piece
            room = torch.empty(0, dtype=self.dtype)
        if len(room) < count * d_in:
            room = torch.empty(count * d_in, dtype=self.dtype)
        piece = room[: count * d_in]
        matrix.fill(piece, rows.start * d_in)
        columns = piece.view(count, d_in).T
        if bias is None:
            torch.mm(x, columns, out=out[:, rows])
        else:
            torch.addmm(bias[rows], x, columns, out=out[:, rows])
        self.pieces.append(room)
