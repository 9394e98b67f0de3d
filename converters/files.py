"""safetensors files, read one tensor at a time and written as a stream.

The safetensors library maps files into memory. Here they are read with plain reads instead: if a file is cut short
while it is mapped, the process is killed; on Windows a mapped file cannot be replaced; and neither the header nor a
copy needs torch. The format is that of the library, and the tests compare the two.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from .atomic import OPEN_FILES
from .errors import UserError
from .headers import BYTES, TensorInfo, check_bounds, parse_header

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 18
"""Bytes read and written at a time: small enough to stay in the processor's cache while its values are checked."""
SEND_EVERY = 4 << 20
"""Bytes after which the system is told to begin writing them to the disk."""

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
STRUCT_CODES = {
    "F64": "d", "F32": "f", "F16": "e", "BF16": "f",
    "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U64": "Q", "U32": "I", "U16": "H", "U8": "B",
}  # fmt: skip
FORMAT_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


class TensorFile:
    """A safetensors file, open for reading one tensor at a time. Close it, or use it in a ``with``.

    ``path``, ``header``: its tensors, metadata and where the data begin. All methods raise UserError where the file
    cannot be read, is damaged, or changes while it is read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._buffer: memoryview | None = None
        self._more: list[FileIO] = []
        self._idle: deque[FileIO] = deque()
        try:
            self._stream = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            raise UserError(f"{self.path.name}: there is no such file.") from None
        except OSError as error:
            raise UserError(f"{self.path.name}: cannot be opened ({error.strerror}).") from None
        except ValueError:
            raise UserError(f"{self.path.name}: is not a possible file name.") from None
        try:
            self._idle.append(self._stream)
            OPEN_FILES.add(self)
            self._stamp = self._stat()
            self.header = parse_header(self._stream, self._stamp[0])
        except ValueError as error:
            self.close()
            raise UserError(f"{self.path.name}: not a usable safetensors file: {error}.") from None
        except OSError as error:
            self.close()
            raise UserError(f"{self.path.name}: cannot be read ({error.strerror}).") from None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for stream in (self._stream, *self._more):
            stream.close()

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._stream.fileno())
        return status.st_size, status.st_mtime_ns

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and position of a tensor. Raises UserError where there is none of this name."""
        try:
            return self.header.tensors[name]
        except KeyError:
            raise UserError(f"{self.path.name}: the tensor {name!r} is missing.") from None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._stamp[0]

    def fileno(self) -> int:
        """The open file's descriptor."""
        return self._stream.fileno()

    def check(self) -> None:
        """Raises UserError where the file has changed since it was opened."""
        try:
            if self._stat() != self._stamp:
                raise UserError(f"{self.path.name}: the file changed while it was read. Try again.")
        except OSError as error:
            raise UserError(f"{self.path.name}: cannot be read ({error.strerror}).") from None

    def read(self, position: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``position`` of the file. Several threads may do so at once."""
        try:
            done = 0
            while done < len(buffer):
                count = self._read(position + done, buffer[done:])
                if not count:
                    raise UserError(f"{self.path.name}: the file became shorter while it was read.")
                done += count
        except OSError as error:
            raise UserError(f"{self.path.name}: cannot be read ({error.strerror}).") from None
        self.check()

    def _read(self, position: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._stream.fileno(), [buffer], position)
        stream = self._own_stream()  # Windows: readers that share one position would wait for each other
        stream.seek(position)
        count = stream.readinto(buffer) or 0
        self._idle.append(stream)
        return count

    def _own_stream(self) -> FileIO:
        """One that no other thread uses now. Raises UserError where another file has the path by now."""
        try:
            return self._idle.pop()
        except IndexError:
            stream = self.path.open("rb", buffering=0)
            self._more.append(stream)
            if not os.path.samestat(os.fstat(stream.fileno()), os.fstat(self._stream.fileno())):
                raise UserError(f"{self.path.name}: the file changed while it was read. Try again.") from None
            return stream

    def readinto(self, info: TensorInfo, buffer: memoryview, offset: int = 0) -> None:
        """Fill ``buffer`` with a tensor's bytes, from its byte ``offset``."""
        self.read(self.header.data_start + info.start + offset, buffer)

    def raw(self, name: str) -> bytearray:
        """The bytes of a tensor as they are in the file (little-endian, row-major)."""
        info = self.info(name)
        buffer = bytearray(info.nbytes)
        self.readinto(info, memoryview(buffer))
        return buffer

    def chunks(self, name: str, start: int = 0, end: int | None = None) -> Iterator[memoryview]:
        """The bytes [start, end) of a tensor in pieces of at most CHUNK bytes.

        All pieces, of all tensors, share one buffer: use each before asking for the next.
        """
        info = self.info(name)
        end = info.nbytes if end is None else end
        buffer = self._buffer = self._buffer or memoryview(bytearray(CHUNK))
        for offset in range(start, end, CHUNK):
            piece = buffer[: min(CHUNK, end - offset)]
            self.readinto(info, piece, offset)
            yield piece

    def number(self, name: str) -> float:
        """The value of a tensor of one element, read without torch. Raises UserError where it is not a number."""
        info = self.info(name)
        if info.dtype not in STRUCT_CODES or math.prod(info.shape) != 1:
            raise UserError(f"{self.path.name}: {name!r} is not a number ({info.dtype} {list(info.shape)}).")
        raw = bytes(self.raw(name))
        # bfloat16 is the upper half of float32
        return float(struct.unpack("<" + STRUCT_CODES[info.dtype], (b"\0\0" if info.dtype == "BF16" else b"") + raw)[0])

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in the file's dtype and shape, on the CPU, in its own memory."""
        import torch

        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        if info.nbytes:
            self.readinto(info, tensor_bytes(tensor))
        return tensor


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype for the format's name of it (F32). Raises UserError for one that torch lacks."""
    import torch

    try:
        return getattr(torch, TORCH_NAMES[name])
    except (KeyError, AttributeError):
        raise UserError(f"The dtype {name} is not supported by this version of torch.") from None


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared and writable."""
    import torch

    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


FLOAT_LIMITS = {
    "F64": (8, 0x7FF << 52),
    "F32": (4, 0x7F800000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E4M3": (1, 0x7F),
    "F8_E5M2": (1, 0x7C),
}
"""Float dtype -> bytes a number, and the bits of the first positive value that is not finite."""


def all_finite(data: bytes | bytearray | memoryview, dtype: str) -> bool:
    """Whether all numbers in ``data``, of a float ``dtype`` (the format's name), are finite. Needs numpy, not torch.

    It compares bits: among signed integers the largest is the positive number of the largest magnitude; among
    unsigned ones it is the negative number, if there is any. That takes two passes and no further memory.
    """
    import numpy

    size, limit = FLOAT_LIMITS[dtype]
    positive, negative = numpy.frombuffer(data, f"<i{size}"), numpy.frombuffer(data, f"<u{size}")
    step, largest = CHUNK // size, numpy.maximum.reduce
    for start in range(0, positive.size, step):
        if largest(positive[start : start + step]) >= limit:
            return False
        if largest(negative[start : start + step]) >= limit + (1 << 8 * size - 1):
            return False
    return True


@dataclass(frozen=True)
class WritePlan:
    """A tensor to write: its header entry, and ``chunks``, which gives its bytes when its turn comes. ``dtype`` is the
    format's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | bytearray | memoryview]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> WritePlan:
        """For a tensor in memory, of any device and layout."""
        tensor = tensor.detach().cpu().contiguous()
        return WritePlan(name, FORMAT_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape),
                    lambda: [tensor_bytes(tensor)] if tensor.numel() else [])  # fmt: skip


def header_bytes(plans: Iterable[WritePlan], metadata: Mapping[str, str] | None = None) -> bytes:
    """All that comes before the first byte of data. Raises UserError where it would be larger than `TensorFile`
    reads."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for plan in plans:
        start, end = end, end + plan.nbytes
        header[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        check_bounds(text)  # nothing is written that would not be read again
    except ValueError as error:
        raise UserError(f"The file cannot be written: {error}. Shorten its description and other metadata.") from None
    return struct.pack("<Q", len(text)) + text


def write(
    stream: BinaryIO,
    plans: Iterable[WritePlan],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Write a safetensors file to ``stream``, a tensor at a time, in the given order. ``progress`` is told after each
    tensor what share of all bytes is written, 0 to 1; what it raises ends the writing.

    Raises UserError where the header would be larger than `TensorFile` reads, and OSError. RuntimeError if a plan
    gives more or fewer bytes than its shape needs.
    """
    plans = list(plans)
    stream.write(header_bytes(plans, metadata))
    sent, start = 0, stream.tell()
    total = sum(plan.nbytes for plan in plans)
    for plan in plans:
        before = stream.tell()
        for chunk in plan.chunks():
            stream.write(chunk)
        end = stream.tell()
        if end - before != plan.nbytes:
            raise RuntimeError(f"{plan.name}: {end - before} bytes for {plan.nbytes}")
        if end - sent >= SEND_EVERY:
            _send_to_disk(stream, sent, end)
            sent = end
        progress((end - start) / total if total else 1.0)


def save_file(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, byte for byte as the safetensors library does. Raises OSError.

    The library writes to a temporary file of its own first, which stays if the process is killed meanwhile.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    with path.open("wb") as stream:
        write(stream, [WritePlan.of(name, tensors[name]) for name in order])


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name, on the CPU. Raises UserError where it cannot be read."""
    with TensorFile(path) as file:
        return {name: file.tensor(name) for name in file.header.tensors}


def _send_to_disk(stream: BinaryIO, start: int, end: int) -> None:
    """Tell the system to begin writing these bytes while the next are computed; otherwise the final fsync has to wait
    for all of them. Only a hint: it does nothing where there is no such call."""
    if sys.platform == "linux":
        with suppress(OSError):  # io.UnsupportedOperation among them, of a stream that is no file
            os.posix_fadvise(stream.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
