"""Weights pass by: groups of tensors are read from safetensors files one after the other, never all at once.

The next group is read on a thread of its own while this one is in use. Reading is by plain reads into buffers that
are used again and again; nothing is mapped, so that a file which is cut short under us is an error with a name and
not a dead process.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import torch
from torch import Tensor, nn

from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.converters.files import Entry, TensorFile, bytes_of, torch_dtype

PIECE = 16 << 20
"""Bytes read between two looks at whether to stop."""

ALIGN = 128
"""Numbers: each tensor in a buffer starts at a multiple of this."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True)
class Run:
    """Where and how one computes, and who listens.

    ``dtype`` is bfloat16, float16 or float32. ``memory`` bounds the bytes of weights and activations. ``cancel`` is
    asked many times a second whether to stop; ``progress`` is told the share done, 0 to 1. Both are called on the
    thread that computes.
    """

    device: str = "cpu"
    dtype: str = "bfloat16"
    memory: int | None = None
    cancel: Callable[[], bool] = lambda: False
    progress: Callable[[float], None] = lambda share: None

    def check(self) -> None:
        """Raises Cancelled when the user wants to stop."""
        if self.cancel():
            raise Cancelled

    def part(self, start: float, end: float) -> Run:
        """The same run for a step whose progress fills ``start`` to ``end`` of the whole."""
        return replace(self, progress=lambda share: self.progress(start + share * (end - start)))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def place(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the device and, if it is of floats, in the dtype of the run."""
        return tensor.to(self.device, self.torch_dtype if tensor.is_floating_point() else tensor.dtype)


class TensorFiles:
    """The safetensors files, one or several shards, of one model. Close it, or use it in a ``with``."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self._where: dict[str, TensorFile] = {}
        with ExitStack() as opened:
            self.files = [opened.enter_context(TensorFile(path)) for path in paths]
            for file in self.files:
                for key in file.header.tensors:
                    if self._where.setdefault(key, file) is not file:
                        raise UserError(f"{file.path.name}: the tensor {key!r} is in another of the files too.")
            self._opened = opened.pop_all()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._opened.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: file.header.tensors[key].shape for key, file in self._where.items()}

    def locate(self, key: str) -> tuple[TensorFile, Entry]:
        """The file and the place of a tensor of floats. Raises UserError where there is none."""
        if key not in self._where:
            others = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
            raise UserError(f"{self.files[0].path.name}{others}: the tensor {key!r} is missing.")
        file = self._where[key]
        entry = file.entry(key)
        if entry.dtype not in FLOATS:
            raise UserError(f"{file.path.name}: the tensor {key!r} holds {entry.dtype}, not floats.")
        return file, entry

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises UserError with the name of the first tensor that is missing or has another shape."""
        for key, shape in shapes.items():
            file, entry = self.locate(key)
            if entry.shape != tuple(shape):
                raise UserError(
                    f"{file.path.name}: the tensor {key!r} has the shape {list(entry.shape)}, not {list(shape)}."
                )

    def rows(self, key: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix, in the file's dtype, [len(rows), ...]: a vocabulary need not be read whole."""
        file, entry = self.locate(key)
        table = torch.empty((len(rows), *entry.shape[1:]), dtype=torch_dtype(entry.dtype))
        stride = entry.nbytes // entry.shape[0]
        for row, line in zip(rows, table, strict=True):
            file.readinto(entry, bytes_of(line), row * stride)
        return table


class _Loader:
    """Brings groups of tensors to the device, on a thread of its own and, on CUDA, on a stream of its own."""

    def __init__(self, files: TensorFiles, run: Run) -> None:
        self.files, self.device, self.dtype = files, torch.device(run.device), run.torch_dtype
        self.stop = Event()
        cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if cuda else None
        self._stages = deque(torch.empty(PIECE, dtype=torch.uint8, pin_memory=cuda) for _ in range(2))
        self._copied: deque[torch.cuda.Event | None] = deque([None, None])

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def numbers(self, names: Mapping[str, str]) -> int:
        """The length of the buffer that a group of tensors needs."""
        return sum(_aligned(math.prod(self.files.locate(key)[1].shape)) for key in names.values())

    def buffer(self, numbers: int) -> Tensor:
        with self._on_stream():
            return torch.empty(numbers, dtype=self.dtype, device=self.device)

    def fill(self, names: Mapping[str, str], buffer: Tensor) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Read ``{name: key in the files}`` into ``buffer``; also the event after which it is there."""
        tensors, offset = {}, 0
        with self._on_stream():
            for name, key in names.items():
                shape = self.files.locate(key)[1].shape
                flat = buffer[offset : offset + math.prod(shape)]
                self._read(key, flat)
                tensors[name] = flat.view(shape)
                offset += _aligned(flat.numel())
            return tensors, self.stream.record_event() if self.stream else None

    def _read(self, key: str, flat: Tensor) -> None:
        file, entry = self.files.locate(key)
        source = torch_dtype(entry.dtype)
        direct = self.device.type == "cpu" and source == self.dtype
        count = PIECE // source.itemsize
        for start in range(0, flat.numel(), count):
            if self.stop.is_set():
                raise Cancelled
            part = flat[start : start + count]
            read = part if direct else self._stage(part.numel(), source)
            try:
                file.readinto(entry, bytes_of(read), start * source.itemsize)
            except UserError as error:
                raise UserError(f"{error} (at the tensor {key!r})") from None
            if not direct:
                part.copy_(read.to(self.device, non_blocking=True) if self.stream else read)
                self._copied.append(self.stream.record_event() if self.stream else None)

    def _stage(self, numbers: int, dtype: torch.dtype) -> Tensor:
        """The stage that was filled longest ago, once its copy has gone out."""
        stage, copied = self._stages.popleft(), self._copied.popleft()
        if copied:
            copied.synchronize()
        self._stages.append(stage)
        return stage[: numbers * dtype.itemsize].view(dtype)


def _aligned(numbers: int) -> int:
    return -(-numbers // ALIGN) * ALIGN


def stream(
    files: TensorFiles, groups: Sequence[Mapping[str, str]], run: Run, *, ahead: int = 1
) -> Generator[dict[str, Tensor], None, None]:
    """Yield the tensors of each group, ``{name: key in the files}``, on the device and in the dtype of ``run``.

    A group's tensors hold until the next is asked for; then their memory serves another. ``ahead`` groups are read
    while one is in use: 1 + ahead buffers of the largest group are taken. Close the iterator (``closing``) when it
    is left early. Raises UserError as TensorFile does, Cancelled when ``run`` says so.
    """
    loader = _Loader(files, run)
    size = max((loader.numbers(names) for names in groups), default=0)
    free = deque(loader.buffer(size) for _ in range(min(1 + ahead, len(groups))))
    waiting: deque[tuple[Tensor, Future]] = deque()
    todo = iter(groups)
    with ThreadPoolExecutor(1, thread_name_prefix="i2l-read") as reader:

        def launch() -> None:
            while free and (names := next(todo, None)) is not None:
                buffer = free.popleft()
                waiting.append((buffer, reader.submit(loader.fill, names, buffer)))

        try:
            launch()
            while waiting:
                buffer, future = waiting.popleft()
                while not future.done():
                    run.check()
                    wait([future], timeout=0.05)
                tensors, arrived = future.result()
                if arrived:
                    torch.cuda.current_stream(loader.device).wait_event(arrived)
                yield tensors
                if arrived:  # the buffer may be filled anew only when the device has done with it
                    torch.cuda.current_stream(loader.device).synchronize()
                free.append(buffer)
                launch()
        finally:
            loader.stop.set()


def load(files: TensorFiles, part: nn.Module, names: Mapping[str, str], run: Run) -> None:
    """Give ``part`` its weights ``{parameter: key in the files}`` for good."""
    for tensors in stream(files, [names], run):  # one group: nothing is filled anew
        part.load_state_dict(tensors, assign=True)
