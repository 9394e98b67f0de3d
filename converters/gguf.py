"""The header of a GGUF file: names, types and shapes of its tensors. Nothing behind it is read."""

from __future__ import annotations

import struct
from pathlib import Path

from .headers import HEADER_LIMIT, TENSOR_LIMIT

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value in the metadata -> its struct format."""
TEXT, ARRAY = 8, 9
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""Type of a tensor, by ggml's number."""
DIMENSIONS = 4
"""Most dimensions of a tensor."""


class _Cursor:
    """Reads one value after another. Raises ValueError where there is no more."""

    def __init__(self, text: bytes) -> None:
        self.text, self.at = text, 0

    def take(self, count: int) -> bytes:
        if count > len(self.text) - self.at:
            raise ValueError("it is cut short, or its header is larger than 8 MB")
        self.at += count
        return self.text[self.at - count : self.at]

    def number(self, format: str) -> int:
        return struct.unpack(f"<{format}", self.take(struct.calcsize(f"<{format}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise ValueError("its names are not text") from None

    def value(self) -> str | None:
        """The next value of the metadata if it is a text; others are passed over."""
        kind = self.number("I")
        if kind == TEXT:
            return self.string()
        if kind != ARRAY:
            self.take(_size(kind))
            return None
        kind, count = self.number("I"), self.number("Q")
        if kind == TEXT:
            for _ in range(count):  # each takes eight bytes at least, so that the end of the text ends it
                self.take(self.number("Q"))
        else:
            self.take(count * _size(kind))
        return None


def _size(kind: int) -> int:
    if kind not in SCALARS:
        raise ValueError("its metadata have an unknown type")
    return struct.calcsize(f"<{SCALARS[kind]}")


def read_gguf(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """{tensor: (type, shape)} with shapes as torch has them (a weight is [d_out, d_in]), and the texts of the metadata.

    Raises OSError, or ValueError with a short reason.
    """
    with path.open("rb") as stream:
        cursor = _Cursor(stream.read(HEADER_LIMIT))
    if cursor.take(4) != MAGIC:
        raise ValueError("it is not a GGUF file")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"it has GGUF version {version}; 2 and 3 are read")
    tensors, values = cursor.number("Q"), cursor.number("Q")
    if tensors > TENSOR_LIMIT or values > TENSOR_LIMIT:
        raise ValueError(f"it claims {max(tensors, values)} tensors or values; more than {TENSOR_LIMIT} are not read")
    said = {cursor.string(): cursor.value() for _ in range(values)}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for _ in range(tensors):
        name, dimensions = cursor.string(), cursor.number("I")
        if dimensions > DIMENSIONS:
            raise ValueError(f"tensor {name[:80]!r} has {dimensions} dimensions")
        if name in found:
            raise ValueError(f"tensor {name[:80]!r} stands twice in its header")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        number, _ = cursor.number("I"), cursor.number("Q")
        found[name] = (TYPES.get(number, f"type {number}"), shape)
    return found, {key: value for key, value in said.items() if value is not None}
