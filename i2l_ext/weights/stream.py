"""Weights pass by: groups of tensors are read from safetensors files one after the other, never all at once.

The next group is read on threads of its own while this one is in use. Reading is by plain reads into buffers that
are used again and again; nothing is mapped, so that a file which is cut short under us is an error with a name and
not a dead process. Where the weights are used as they lie on disk, they are read to where they are used: a tensor
is a view of the file's bytes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TypeVar

import torch
from torch import Tensor, nn

from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.converters.files import TensorFile, TensorInfo, tensor_bytes, torch_dtype
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks, ComputeOptions
from i2l_ext.weights.source import PAGE, Source, on_a_page, pages, too_large_to_keep

PIECE = 16 << 20
"""Bytes read between two looks at whether to stop."""

ALIGN = 128
"""Numbers: each tensor that is converted starts at a multiple of this in its buffer."""

READERS = 2
"""Threads that read: while one waits for the disk, the other's next piece is asked for already."""

Result = TypeVar("Result")

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


class TensorFiles:
    """The safetensors files, one or several shards, of one model. Close it, or use it in a ``with``."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self._where: dict[str, TensorFile] = {}
        with ExitStack() as opened:
            self.files = [opened.enter_context(TensorFile(path)) for path in paths]
            direct = too_large_to_keep(sum(file.size for file in self.files))
            self.sources = {file: opened.enter_context(closing(Source(file, direct=direct))) for file in self.files}
            self.order = {file: number for number, file in enumerate(self.files)}
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

    def locate(self, key: str) -> tuple[TensorFile, TensorInfo]:
        """The file and the place of a tensor of floats. Raises UserError where there is none."""
        if key not in self._where:
            others = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
            raise UserError(f"{self.files[0].path.name}{others}: the tensor {key!r} is missing.")
        file = self._where[key]
        entry = file.info(key)
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
            file.readinto(entry, tensor_bytes(line), row * stride)
        return table


@dataclass(frozen=True)
class Place:
    """A tensor by its name in a group, and where it lies."""

    name: str
    key: str
    file: TensorFile
    entry: TensorInfo

    @property
    def start(self) -> int:
        """Its first byte in the file."""
        return self.file.header.data_start + self.entry.start

    @property
    def dtype(self) -> torch.dtype:
        """On disk."""
        return torch_dtype(self.entry.dtype)

    def tensor(self, buffer: Tensor, at: int) -> Tensor:
        """Its bytes in ``buffer`` from ``at`` on."""
        return buffer[at : at + self.entry.nbytes].view(self.dtype).view(self.entry.shape)


@dataclass
class Piece:
    """Neighbours in a file that are read at once: the bytes [start, end) of it, to be put at ``at`` of a buffer.

    ``parts``: of which tensors, from which byte to which of each.
    """

    file: TensorFile
    start: int
    end: int
    at: int
    parts: list[tuple[Place, int, int]] = field(default_factory=list)


class Loader:
    """Brings groups of tensors to the device; on CUDA through pinned memory, on a stream of its own.

    A group that is wanted as it lies in the file, on the CPU, is read to where it stays; any other goes through a
    stage, of which each thread that reads has one.
    """

    def __init__(self, files: TensorFiles, options: ComputeOptions) -> None:
        self.files, self.device, self.dtype = files, torch.device(options.device), options.torch_dtype
        self.stop = Event()
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._stages: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def nbytes(self, names: Mapping[str, str]) -> int:
        """How long a buffer is enough for a group of tensors."""
        entries = [self.files.locate(key)[1] for key in names.values()]
        converted = sum(_aligned(math.prod(entry.shape)) for entry in entries) * self.dtype.itemsize
        return max(converted, sum(entry.nbytes + 2 * PAGE for entry in entries))

    def buffer(self, nbytes: int) -> Tensor:
        """Uninitialised bytes; on the CPU they begin on a page of memory."""
        if self.device.type == "cpu":
            return pages(nbytes)
        with self.on_stream():
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def plan(self, names: Mapping[str, str], buffer: Tensor) -> tuple[dict[str, Tensor], list[Callable[[], None]]]:
        """The tensors of a group as they will stand in ``buffer``, and the reading that has to be done before, in
        parts that may be done at once."""
        places = [Place(name, key, *self.files.locate(key)) for name, key in names.items()]
        places.sort(key=lambda place: (self.files.order[place.file], place.start))
        pieces = list(self._pieces(places))
        if self._in_place(places):
            starts: dict[str, int] = {}
            for piece in pieces:
                for place, offset, _ in piece.parts:
                    starts.setdefault(place.name, piece.at + place.start + offset - piece.start)
            tensors = {place.name: place.tensor(buffer, starts.get(place.name, 0)) for place in places}
            return tensors, [partial(self._read, piece, buffer) for piece in pieces]
        flat, tensors, end = buffer[: len(buffer) // 8 * 8].view(self.dtype), {}, 0
        for place in places:
            numbers = math.prod(place.entry.shape)
            tensors[place.name] = flat[end : end + numbers].view(place.entry.shape)
            end += _aligned(numbers)
        return tensors, [partial(self._convert, piece, tensors) for piece in pieces]

    def _in_place(self, places: Sequence[Place]) -> bool:
        """Whether a group is used as it lies on disk."""
        return self.device.type == "cpu" and all(
            place.dtype == self.dtype and place.start % self.dtype.itemsize == 0 for place in places
        )

    def _pieces(self, places: Sequence[Place]) -> Iterator[Piece]:
        """What there is to read, in the order of the files. Each piece stands in the buffer as in its file with
        regard to pages, and behind its neighbour."""
        piece = None
        for place in places:
            for offset in range(0, place.entry.nbytes, PIECE):
                until = min(offset + PIECE, place.entry.nbytes)
                start, end = place.start + offset, place.start + until
                near = piece is not None and piece.file is place.file and piece.end == start
                if not (piece and near and end - piece.start <= PIECE):
                    behind = piece.at + piece.end - piece.start if piece else 0
                    if piece:
                        yield piece
                    piece = Piece(place.file, start, end, behind if near else -(-behind // PAGE) * PAGE + start % PAGE)
                piece.end = end
                piece.parts.append((place, offset, until))
        if piece:
            yield piece

    def read(self, names: Mapping[str, str], buffer: Tensor) -> dict[str, Tensor]:
        """A group's tensors in ``buffer``, read on this thread. They hold until the buffer is used again."""
        tensors, work = self.plan(names, buffer)
        for job in work:
            job()
        return tensors

    def _read(self, piece: Piece, buffer: Tensor) -> None:
        if self.stop.is_set():
            raise Cancelled
        try:
            area = tensor_bytes(buffer[piece.at - piece.start % PAGE :])
            self.files.sources[piece.file].read(piece.start, piece.end, area)
        except UserError as error:
            raise UserError(f"{error} (at the tensor {piece.parts[0][0].key!r})") from None

    def _convert(self, piece: Piece, tensors: Mapping[str, Tensor]) -> None:
        stage, copied = self._stage()
        if copied:
            copied.synchronize()
        at = piece.start % PAGE
        self._read(replace(piece, at=at), stage)
        with self.on_stream():
            for place, offset, until in piece.parts:
                size, read = place.dtype.itemsize, stage[at : at + until - offset]
                read = (read.clone() if at % size else read).view(place.dtype)
                part = tensors[place.name].view(-1)[offset // size : until // size]
                part.copy_(read.to(self.device, non_blocking=True) if self.stream else read)
                at += until - offset
            self._stages.append((stage, self.stream.record_event() if self.stream else None))

    def _stage(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The stage that was filled longest ago, and when its copy has gone out."""
        try:
            return self._stages.popleft()
        except IndexError:  # on each thread's first calls
            room = torch.empty(PIECE + 3 * PAGE, dtype=torch.uint8, pin_memory=self.stream is not None)
            return on_a_page(room), None


def _aligned(numbers: int) -> int:
    return -(-numbers // ALIGN) * ALIGN


def outcome(futures: Iterable[Future[Result]], callbacks: Callbacks) -> list[Result]:
    """Their results. Raises what they raised, and Cancelled as soon as the user wants to stop."""
    results = []
    for future in futures:
        while not future.done():
            callbacks.check()
            wait([future], timeout=0.05)
        results.append(future.result())
    return results


def stream(
    files: TensorFiles,
    groups: Sequence[Mapping[str, str]],
    options: ComputeOptions,
    callbacks: Callbacks = NO_CALLBACKS,
    *,
    ahead: int = 1,
) -> Generator[dict[str, Tensor], None, None]:
    """Yield the tensors of each group, ``{name: key in the files}``, on the device and in the dtype of ``options``.

    A group's tensors hold until the next is asked for; then their memory serves another. ``ahead`` groups are read
    while one is in use: 1 + ahead buffers of the largest group are taken. Close the iterator (``closing``) when it
    is left early. Raises UserError as TensorFile does, Cancelled when the user wants to stop.
    """
    loader = Loader(files, options)
    size = max((loader.nbytes(names) for names in groups), default=0)
    free = deque(loader.buffer(size) for _ in range(min(1 + ahead, len(groups))))
    waiting: deque[tuple[Tensor, dict[str, Tensor], list[Future[None]]]] = deque()
    todo = iter(groups)
    with ThreadPoolExecutor(READERS, thread_name_prefix="i2l-read") as readers:

        def launch() -> None:
            while free and (names := next(todo, None)) is not None:
                buffer = free.popleft()
                tensors, work = loader.plan(names, buffer)
                waiting.append((buffer, tensors, [readers.submit(job) for job in work]))

        try:
            launch()
            while waiting:
                buffer, tensors, reading = waiting.popleft()
                outcome(reading, callbacks)
                if loader.stream:
                    torch.cuda.current_stream(loader.device).wait_stream(loader.stream)
                yield tensors
                if loader.stream:  # the buffer may be filled anew only when the device has done with it
                    torch.cuda.current_stream(loader.device).synchronize()
                free.append(buffer)
                launch()
        finally:
            loader.stop.set()


def load(
    files: TensorFiles,
    part: nn.Module,
    names: Mapping[str, str],
    options: ComputeOptions,
    callbacks: Callbacks = NO_CALLBACKS,
) -> None:
    """Give ``part`` its weights ``{parameter: key in the files}`` for good."""
    for tensors in stream(files, [names], options, callbacks):  # one group: nothing is filled anew
        part.load_state_dict(tensors, assign=True)
