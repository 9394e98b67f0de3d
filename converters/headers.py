"""The header of a safetensors file, and other JSON that comes with model files, read within limits of memory."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

HEADER_LIMIT = 8 << 20
"""Bytes. The largest real header here, of 2,880 tensors, has 0.4 MB."""
TENSOR_LIMIT = 25_000
"""Tensors in a file. The largest LoRA here has 2,538, the largest checkpoint 2,880, its training five times that."""
VALUE_LIMIT = 250_000
"""Commas and opening brackets in a header, nine a tensor. Each may become an object of up to 250 bytes. Those inside
texts count too, which keeps the count fast: a trainer's list of tags has tens of thousands."""

BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes an element, by the format's dtype name."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: its dtype (the format's name), its shape, and its bytes [start, end) behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """Of a file: its tensors by name, in file order; its metadata; the position of the first byte of data."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}


def check_bounds(text: bytes) -> None:
    """Raises ValueError with a short reason for a header that is too large or has too many values.

    It counts bytes before any object is made: parsed JSON can take forty times its size in memory.
    """
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"its header claims {len(text) / 1e6:.0f} MB")
    claimed = text.count(b'"data_offsets"')
    if claimed > TENSOR_LIMIT:
        raise ValueError(f"it claims {claimed} tensors; more than {TENSOR_LIMIT} are not read")
    values = sum(map(text.count, (b",", b"[", b"{")))
    if values > VALUE_LIMIT:  # whatever its names are, and however they are spelled
        raise ValueError(f"its header holds {values} values; more than {VALUE_LIMIT} are not read")


def parse_json(text: bytes) -> dict[str, Any]:
    """The object in JSON that may come from anybody. Raises ValueError with a short reason."""
    check_bounds(text)
    try:
        found = json.loads(text.decode(), object_pairs_hook=_unique, parse_int=_short)
    except RecursionError:
        raise ValueError("its header is nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("its header is not text") from None
    except json.JSONDecodeError:
        raise ValueError("its header is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError("its header is no JSON object")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError with a short reason."""
    with path.open("rb") as stream:
        return parse_json(stream.read(HEADER_LIMIT + 1))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Raises ValueError for two equal names: the parser would keep the last one."""
    if len(pairs) > TENSOR_LIMIT:
        raise ValueError(f"it claims {len(pairs)} tensors; more than {TENSOR_LIMIT} are not read")
    seen = dict(pairs)
    if len(seen) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return seen


def _short(digits: str) -> int:
    """Raises ValueError for a long number: the time to read it grows with the square of its digits."""
    if len(digits) > 20:
        raise ValueError("a number in its header has too many digits")
    return int(digits)


def _tensor_info(name: str, raw: object) -> TensorInfo:
    if not isinstance(raw, dict):
        raise ValueError(f"tensor {name!r} is not described")
    dtype, shape, offsets = raw.get("dtype"), _counts(raw.get("shape")), _counts(raw.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {str(dtype)[:20]!r}")
    if shape is None or offsets is None:
        raise ValueError(f"tensor {name!r} has no proper shape or offsets")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * BYTES[dtype]:
        raise ValueError(f"tensor {name!r} has offsets that do not fit its shape")
    return TensorInfo(dtype, tuple(shape), *offsets)


def _counts(raw: object) -> list[int] | None:
    return raw if isinstance(raw, list) and len(raw) <= 16 and all(map(_is_count, raw)) else None


def _is_count(n: object) -> bool:
    return type(n) is int and 0 <= n < 1 << 48


def _read(stream: BinaryIO, count: int) -> bytes:
    """``count`` bytes, fewer only at the end of the stream. One read may give less than there is."""
    pieces = []
    while count and (piece := stream.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def parse_header(stream: BinaryIO, size: int) -> Header:
    """Read and check the header of a safetensors ``stream`` of ``size`` bytes.

    Raises ValueError with a short reason. Like the library it insists that the tensors fill the data without gap,
    overlap or rest.
    """
    if size == 0:
        raise ValueError("the file is empty")
    first = _read(stream, 8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if length < 2 or length > size - 8:
        raise ValueError("it is cut short or not a safetensors file")
    if length > HEADER_LIMIT:
        raise ValueError(f"its header claims {length / 1e6:.0f} MB")
    text = _read(stream, length)
    if len(text) != length or text[:1] != b"{":
        raise ValueError("it is cut short or not a safetensors file")
    raw = parse_json(text)
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not text")
    try:
        for said in (*raw, *metadata, *metadata.values()):
            said.encode()
    except UnicodeEncodeError:  # JSON can spell half a character, which no file that we write could hold
        raise ValueError("its names are not text") from None
    infos = [(name, _tensor_info(name, value)) for name, value in raw.items()]
    end = 0
    for name, info in sorted(infos, key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            raise ValueError(f"tensor {name!r} overlaps another or leaves a gap")
        end = info.end
    if 8 + length + end > size:
        raise ValueError(f"it is cut short: {size} bytes of {8 + length + end}")
    if 8 + length + end < size:
        raise ValueError(f"{size - 8 - length - end} bytes follow the last tensor")
    return Header(dict(sorted(infos, key=lambda item: item[1].start)), metadata, 8 + length)
