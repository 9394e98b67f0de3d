"""safetensors files, read one tensor at a time and written as a stream, whole or not at all.

The safetensors library maps files into memory. Here they are read with plain reads instead: a file that is cut
short under a map kills the process, a map keeps a file from being replaced on Windows, and neither header nor
copy needs torch. The format is that of the library, and the tests hold both against each other.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from .errors import UserError
from .headers import BYTES, Entry, check_bounds, parse_header

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 18
"""Bytes read and written at a time: small enough to stay in the processor's cache while its values are checked."""
BEHIND = 4 << 20
"""Bytes that are written before the disk is told to begin with them."""

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

    Raises UserError where the file cannot be read, is not what it claims, or changes while it is read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._buffer: memoryview | None = None
        self._seeking = Lock()
        try:
            self._stream = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            raise UserError(f"{self.path.name}: there is no such file.") from None
        except OSError as error:
            raise UserError(f"{self.path.name}: cannot be opened ({error.strerror}).") from None
        except ValueError:
            raise UserError(f"{self.path.name}: no disk has files of such a name.") from None
        try:
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
        self._stream.close()

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._stream.fileno())
        return status.st_size, status.st_mtime_ns

    def entry(self, name: str) -> Entry:
        try:
            return self.header.tensors[name]
        except KeyError:
            raise UserError(f"{self.path.name}: the tensor {name!r} is missing.") from None

    @property
    def size(self) -> int:
        return self._stamp[0]

    def fileno(self) -> int:
        return self._stream.fileno()

    def check(self) -> None:
        """Raises UserError where the file is no longer what it was when it was opened."""
        try:
            if self._stat() != self._stamp:
                raise UserError(f"{self.path.name}: the file changed while it was read. Try again.")
        except OSError as error:
            raise UserError(f"{self.path.name}: cannot be read ({error.strerror}).") from None

    def read(self, position: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``position`` of the file on. Several threads may do so at once."""
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
        with self._seeking:  # Windows
            self._stream.seek(position)
            return self._stream.readinto(buffer) or 0

    def readinto(self, entry: Entry, buffer: memoryview, offset: int = 0) -> None:
        """Fill ``buffer`` with the bytes of ``entry`` from its byte ``offset`` on."""
        self.read(self.header.data_start + entry.start + offset, buffer)

    def raw(self, name: str) -> bytearray:
        """The bytes of a tensor as they lie in the file (little-endian, row-major)."""
        entry = self.entry(name)
        buffer = bytearray(entry.nbytes)
        self.readinto(entry, memoryview(buffer))
        return buffer

    def chunks(self, name: str, start: int = 0, end: int | None = None) -> Iterator[memoryview]:
        """The bytes [start, end) of a tensor in pieces of at most CHUNK; each piece is valid until the
        next is asked for, of this tensor or another: they share a buffer."""
        entry = self.entry(name)
        end = entry.nbytes if end is None else end
        buffer = self._buffer = self._buffer or memoryview(bytearray(CHUNK))
        for offset in range(start, end, CHUNK):
            piece = buffer[: min(CHUNK, end - offset)]
            self.readinto(entry, piece, offset)
            yield piece

    def number(self, name: str) -> float:
        """A tensor of one element, read without torch. Raises UserError where it is no number."""
        entry = self.entry(name)
        if entry.dtype not in STRUCT_CODES or math.prod(entry.shape) != 1:
            raise UserError(f"{self.path.name}: {name!r} is not a number ({entry.dtype} {list(entry.shape)}).")
        raw = bytes(self.raw(name))
        # bfloat16 is the upper half of float32
        return float(
            struct.unpack("<" + STRUCT_CODES[entry.dtype], (b"\0\0" if entry.dtype == "BF16" else b"") + raw)[0]
        )

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, in the file's dtype and shape, in memory of its own."""
        import torch

        entry = self.entry(name)
        tensor = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
        if entry.nbytes:
            self.readinto(entry, bytes_of(tensor))
        return tensor


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a format's dtype name; raises UserError for one that torch lacks."""
    import torch

    try:
        return getattr(torch, TORCH_NAMES[name])
    except (KeyError, AttributeError):
        raise UserError(f"The dtype {name} is not supported by this version of torch.") from None


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared and writable."""
    import torch

    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


MAGNITUDES = {
    "F64": (8, 0x7FF << 52),
    "F32": (4, 0x7F800000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E4M3": (1, 0x7F),
    "F8_E5M2": (1, 0x7C),
}
"""By float dtype: bytes a number, and the bits of the first positive value that is not finite."""


def finite(data: bytes | bytearray | memoryview, dtype: str) -> bool:
    """Whether all numbers of a float ``dtype`` in ``data`` are finite, told from their bits: no torch needed.

    Read as signed integers the largest is the positive number of the largest magnitude; read as unsigned ones it is
    the negative one, as soon as there is one. Two passes, and no memory.
    """
    import numpy

    size, limit = MAGNITUDES[dtype]
    positive, negative = numpy.frombuffer(data, f"<i{size}"), numpy.frombuffer(data, f"<u{size}")
    step = CHUNK // size
    return all(
        positive[start : start + step].max() < limit
        and negative[start : start + step].max() < limit + (1 << 8 * size - 1)
        for start in range(0, positive.size, step)
    )


@dataclass(frozen=True)
class Plan:
    """A tensor to be written: what the header says of it, and how to get its bytes when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | bytearray | memoryview]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> Plan:
        tensor = tensor.detach().cpu().contiguous()
        return Plan(name, FORMAT_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape),
                    lambda: [bytes_of(tensor)] if tensor.numel() else [])  # fmt: skip


def write(stream: BinaryIO, plans: Iterable[Plan], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file to ``stream``, a tensor at a time, in the order given.

    Raises UserError where its header would be larger than we read."""
    plans = list(plans)
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
    stream.write(struct.pack("<Q", len(text)))
    stream.write(text)
    sent = 0
    for plan in plans:
        before = stream.tell()
        for chunk in plan.chunks():
            stream.write(chunk)
        end = stream.tell()
        if end - before != plan.nbytes:
            raise RuntimeError(f"{plan.name}: {end - before} bytes for {plan.nbytes}")
        if end - sent >= BEHIND:
            _send_to_disk(stream, sent, end)
            sent = end


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to a safetensors file, byte for byte as the safetensors library does. That one writes to a
    temporary file of its own first, which stays where the process is killed meanwhile."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    with path.open("wb") as stream:
        write(stream, [Plan.of(name, tensors[name]) for name in order])


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name, each in memory of its own. Raises UserError."""
    with TensorFile(path) as file:
        return {name: file.tensor(name) for name in file.header.tensors}


def _send_to_disk(stream: BinaryIO, start: int, end: int) -> None:
    """Have the system begin to write these bytes while the next are made; else all of the disk's time comes at the
    end, in fsync. A hint: where there is no such call, or the disk does not take it, nothing is lost."""
    if sys.platform == "linux":
        with suppress(OSError):  # io.UnsupportedOperation among them, of a stream that is no file
            os.posix_fadvise(stream.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
