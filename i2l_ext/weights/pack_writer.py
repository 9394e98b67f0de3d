"""Packs a model file while its bytes arrive, from a disk or a hub."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Generator
from dataclasses import replace
from hashlib import sha256
from typing import BinaryIO

import torch

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import BYTES, TensorInfo, WritePlan, header_bytes, tensor_bytes, torch_dtype
from i2l_ext.converters.headers import HEADER_LIMIT, parse_header
from i2l_ext.weights.packed_numbers import pack
from i2l_ext.weights.packing import METADATA, PACK_FORMATS, SCALE_BYTES, PackNote, is_packed

PIECE = 4 << 20
"""Bytes of the unpacked file that are packed at a time: a whole number of groups in every dtype."""


class PackWriter:
    """Takes the bytes of a safetensors file in order, and writes the packed file to ``stream``, which is empty.

    Each matrix becomes its scales and, behind them, its bytes; other tensors stay as they are. ``note``: what the file
    says of its origin, whose sha256 is filled in by ``finish``: until then the file has no header.
    """

    def __init__(self, stream: BinaryIO, size: int, name: str, note: PackNote) -> None:
        """``size``: bytes of the unpacked file, ``name``: its name, for errors."""
        self.stream, self.size, self.name, self.note = stream, size, name, note
        self.restart()

    def restart(self) -> None:
        """Forget what was written."""
        self.stream.seek(0)
        self.stream.truncate()
        self.taken, self.sha, self.held = 0, sha256(), bytearray()
        self.header = b""
        self.work = self._work()
        self.wanted = next(self.work)

    def write(self, chunk: bytes | memoryview) -> int:
        """The next bytes. Raises UserError where they cannot be those of a file to pack, and OSError."""
        self.sha.update(chunk)
        self.held += chunk
        self.taken += len(chunk)
        while self.wanted and len(self.held) >= self.wanted:
            piece = bytes(self.held[: self.wanted])
            del self.held[: self.wanted]
            try:
                self.wanted = self.work.send(piece)
            except StopIteration:
                self.wanted = 0
        return len(chunk)

    def finish(self) -> str:
        """Write the header; the sha256 of the unpacked file. Raises UserError where some of it is missing."""
        if self.wanted or self.held:
            raise UserError(f"{self.name}: is cut short.")
        origin = self.sha.hexdigest()
        self.stream.seek(0)
        self.stream.write(self._header(origin))
        return origin

    def _work(self) -> Generator[int, bytes, None]:
        """Asks for so many bytes, and is sent them."""
        first = yield 8
        length = min(struct.unpack("<Q", first)[0], HEADER_LIMIT, max(self.size - 8, 1))
        try:
            header = parse_header(io.BytesIO(first + (yield length)), self.size)
        except ValueError as error:
            raise UserError(f"{self.name}: not a usable safetensors file: {error}.") from None
        self._plan(header.tensors, header.metadata)
        end = len(self._header("0" * 64))
        self.stream.write(bytes(end))
        form = PACK_FORMATS[self.note.form]
        for key, info in header.tensors.items():
            packed = is_packed(info, self.note.form)
            count = math.prod(info.shape)
            dtype, length = form.scales(count) if packed else ("U8", 0)
            scales, values = end, end + length * BYTES[dtype]
            low, end = scales + SCALE_BYTES * (count // form.group), values + (count if packed else info.nbytes)
            for start in range(0, info.nbytes, PIECE):
                piece = yield min(PIECE, info.nbytes - start)
                if not packed:
                    self._put(values + start, piece)
                    continue
                numbers = torch.frombuffer(bytearray(piece), dtype=torch_dtype(info.dtype))
                try:
                    parts = pack(numbers, self.note.form)
                except ValueError as error:
                    raise UserError(f"{self.name}: the tensor {key!r} holds {error}: it cannot be packed.") from None
                done = start // numbers.itemsize
                places = (values + done, scales + SCALE_BYTES * (done // form.group), low + done // 8)
                for place, part in zip(places, parts, strict=True):
                    self._put(place, tensor_bytes(part))

    def _put(self, position: int, data: bytes | memoryview) -> None:
        self.stream.seek(position)
        self.stream.write(data)

    def _plan(self, tensors: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
        if any(info.dtype in ("I8", "F8_E4M3", "F8_E5M2") for info in tensors.values()):
            raise UserError(f"{self.name}: holds one byte a number already: there is nothing to pack.")
        self.metadata = metadata
        self.plans = []
        for key, info in tensors.items():
            if not is_packed(info, self.note.form):
                self.plans.append(WritePlan(key, info.dtype, info.shape, list))
                continue
            form = PACK_FORMATS[self.note.form]
            dtype, length = form.scales(math.prod(info.shape))
            self.plans.append(WritePlan(f"{key}_scale", dtype, (length,), list))
            self.plans.append(WritePlan(key, form.dtype, info.shape, list))

    def _header(self, origin: str) -> bytes:
        """The header that a file of these tensors has."""
        text = replace(self.note, origin=origin).text
        return header_bytes(self.plans, {**self.metadata, METADATA: text})
