"""What the benchmarks share: weights of any shapes, several things timed in turns."""

from __future__ import annotations

import fcntl
import gc
import math
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from io import UnsupportedOperation
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from i2l_ext import runtime  # noqa: E402

runtime.configure_process()

import torch  # noqa: E402

from i2l_ext.converters.files import WritePlan, header_bytes, tensor_bytes, write  # noqa: E402
from i2l_ext.weights.pack_writer import PackWriter  # noqa: E402
from i2l_ext.weights.packing import PackNote  # noqa: E402
from i2l_ext.weights.stored import PIECE  # noqa: E402


def random_file(path: Path, shapes: Mapping[str, Sequence[int]], seed: int = 0, note: PackNote | None = None) -> Path:
    """A checkpoint of random bfloat16 weights that keep the size of what passes through: matrices of gain one, the
    scales of norms one. All numbers come from one pool of normals, as 30 GB of fresh ones would take long. With a
    ``note`` it is packed while it is made: the disk never holds it unpacked."""
    random = torch.Generator().manual_seed(seed)
    pool = torch.randn(1 << 24, generator=random)
    scaled: dict[int, torch.Tensor] = {}

    def chunks(name: str, shape: Sequence[int]) -> Iterator[memoryview]:
        count, inputs = math.prod(shape), math.prod(shape[1:])
        if len(shape) == 1:
            yield tensor_bytes(torch.full((count,), float(name.endswith(("weight", "lambda1")))).bfloat16())
            return
        if inputs not in scaled:
            scaled[inputs] = (pool / math.sqrt(inputs)).bfloat16()
        start = int(torch.randint(len(pool), (), generator=random))
        while count:
            piece = scaled[inputs][start : start + count]
            yield tensor_bytes(piece)
            count, start = count - len(piece), 0

    plans = [WritePlan(name, "BF16", tuple(shape), partial(chunks, name, shape)) for name, shape in shapes.items()]
    if note:
        size = len(header_bytes(plans)) + sum(plan.nbytes for plan in plans)
        with path.open("w+b") as stream:
            packing = Packing(stream, size, path.name, note)
            write(packing, plans)  # type: ignore[arg-type]
            packing.finish()
        return path
    with path.open("wb", buffering=0) as stream:
        straight = Straight(stream)
        write(straight, plans)  # type: ignore[arg-type]
        straight.finish()
    return path


class Packing(PackWriter):
    """Packs what is written to it."""

    def tell(self) -> int:
        return self.taken

    def fileno(self) -> int:
        raise UnsupportedOperation


class Straight:
    """Writes to a file past the page cache, where the system can: 60 GB through it would take longer."""

    def __init__(self, stream: BinaryIO) -> None:
        self.number, self.page, self.filled, self.done = stream.fileno(), memoryview(mmap.mmap(-1, 16 << 20)), 0, 0
        self._direct(True)

    def _direct(self, on: bool) -> None:
        if sys.platform == "linux":
            flags = fcntl.fcntl(self.number, fcntl.F_GETFL) & ~os.O_DIRECT
            with suppress(OSError):  # a file system that cannot
                fcntl.fcntl(self.number, fcntl.F_SETFL, flags | (os.O_DIRECT if on else 0))

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data)
        while rest:
            count = min(len(rest), len(self.page) - self.filled)
            self.page[self.filled : self.filled + count] = rest[:count]
            self.filled, rest = self.filled + count, rest[count:]
            if self.filled == len(self.page):
                self._flush()
        return len(data)

    def fileno(self) -> int:
        return self.number

    def tell(self) -> int:
        return self.done + self.filled

    def _flush(self) -> None:
        sent = 0
        while sent < self.filled:
            sent += os.write(self.number, self.page[sent : self.filled])
        self.done, self.filled = self.done + self.filled, 0

    def finish(self) -> None:
        self._direct(False)
        self._flush()
        os.fsync(self.number)


GLIBC = {runtime.MMAP_THRESHOLD: 32 << 20, runtime.TRIM_THRESHOLD: 64 << 20, runtime.TOP_PAD: 128 << 10}
"""What glibc's thresholds (see ``runtime.KEEP_FREED``) come to by themselves once a program has freed 32 MB at once."""


def usual(job: Callable[[], Any]) -> Callable[[], Any]:
    """A peer's job with freed memory treated as in any program, and not as in ours."""

    def run() -> Any:
        runtime.set_malloc_options(GLIBC)
        try:
            return job()
        finally:
            runtime.set_malloc_options(runtime.KEEP_FREED)

    return run


def linear_in_pieces(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x [N, d_in] times a matrix [d_out, d_in], to [N, d_out], as our layers multiply: a piece of it at a time."""
    out, rows = x.new_empty(len(x), len(matrix)), max(1, PIECE // matrix.shape[1])
    for piece, columns in zip(matrix.split(rows), out.split(rows, 1), strict=True):
        torch.mm(x, piece.T, out=columns)
    return out


def out_of_cache(paths: Sequence[Path]) -> None:
    """Have the next read come from the disk."""
    gc.collect()  # what is still mapped stays
    os.sync()
    for path in paths:
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_turns(
    jobs: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each job in each round, A B A B …, so that a busy machine is busy for all; one round goes before.

    ``before`` goes before each job and is not counted.
    """
    seconds: dict[str, list[float]] = {title: [] for title in jobs}
    for number in range(rounds + 1):
        for title, job in jobs.items():
            before()
            start = time.perf_counter()
            job()
            if number:
                seconds[title].append(time.perf_counter() - start)
    return seconds


def spread(times: Sequence[float]) -> str:
    """Median (least to most) in seconds."""
    return f"{statistics.median(times):.3g} ({min(times):.3g} to {max(times):.3g})"


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    """How many times faster: the median of the rounds' ratios, and their range."""
    ratios = [s / f for s, f in zip(slow, fast, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
