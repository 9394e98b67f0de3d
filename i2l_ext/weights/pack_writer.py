"""Packs a model file while its bytes arrive, from a disk or a hub, and gives packed numbers their values again."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Generator
from dataclasses import replace
from hashlib import sha256
from typing import BinaryIO

import torch
from torch import Tensor

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TORCH_NAMES, TensorInfo, WritePlan, header_bytes, tensor_bytes, torch_dtype
from i2l_ext.converters.headers import HEADER_LIMIT, parse_header
from i2l_ext.weights.packing import GROUP, METADATA, PACK_FORMATS, PackNote, is_packed

PIECE = 4 << 20
"""Bytes of the unpacked file that are packed at a time: a whole number of groups in every dtype."""

CHUNK = 1 << 20
"""Numbers that get their values at a time: few enough to stay in the processor's cache between two steps."""


def pack(numbers: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Floats [n x GROUP] to one byte each, [n x GROUP], and scales [n] in bfloat16, rounded to the nearest.

    Raises ValueError for NaN and infinity.
    """
    target = PACK_FORMATS[form]
    groups = numbers.float().view(-1, GROUP)
    largest = groups.abs().amax(1)
    if not torch.isfinite(largest).all():
        raise ValueError("NaN or infinity")
    scales = (largest / target.largest).bfloat16()
    wide = scales.float()
    shares = (groups / wide.where(wide > 0, 1)[:, None]).clamp_(-target.largest, target.largest)
    shares = shares.round_() if form == "int8" else shares
    return shares.to(getattr(torch, TORCH_NAMES[target.dtype])).view(-1), scales


def unpack(packed: Tensor, scales: Tensor, group: int, first: int, out: Tensor) -> None:
    """Put packed numbers [n], of which the first is number ``first`` of its tensor, times their scales into ``out``
    [n]. ``scales`` are those of the whole tensor, for ``group`` numbers each."""
    scales = scales.view(-1)
    done = 0
    while done < len(packed):
        at = first + done
        if at % group or len(packed) - done < group:  # the rest of a group
            end = min(done + group - at % group, len(packed))
        else:
            end = done + max((min(CHUNK, len(packed) - done)) // group, 1) * group
        own = scales[at // group : -(-(first + end) // group)]
        values, rows = out[done:end], min(group, end - done)
        if values.dtype in (own.dtype, torch.float32):
            values.copy_(packed[done:end])
            values.mul_(own.to(values.dtype).repeat_interleave(rows))  # twice as fast as rows of sixteen
        else:  # a product is rounded once
            values.copy_(packed[done:end].float() * own.float().repeat_interleave(rows))
        done = end


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
        for key, info in header.tensors.items():
            packed = is_packed(info)
            count = math.prod(info.shape)
            scales, values = end, end + (2 * count // GROUP if packed else 0)
            end = values + (count if packed else info.nbytes)
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
                self._put(values + done, tensor_bytes(parts[0]))
                self._put(scales + 2 * (done // GROUP), tensor_bytes(parts[1]))

    def _put(self, position: int, data: bytes | memoryview) -> None:
        self.stream.seek(position)
        self.stream.write(data)

    def _plan(self, tensors: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
        if any(info.dtype in ("I8", "F8_E4M3", "F8_E5M2") for info in tensors.values()):
            raise UserError(f"{self.name}: holds one byte a number already: there is nothing to pack.")
        self.metadata = metadata
        self.plans = []
        for key, info in tensors.items():
            if not is_packed(info):
                self.plans.append(WritePlan(key, info.dtype, info.shape, list))
                continue
            self.plans.append(WritePlan(f"{key}_scale", "BF16", (math.prod(info.shape) // GROUP,), list))
            self.plans.append(WritePlan(key, PACK_FORMATS[self.note.form].dtype, info.shape, list))

    def _header(self, origin: str) -> bytes:
        """The header that a file of these tensors has."""
        text = replace(self.note, origin=origin).text
        return header_bytes(self.plans, {**self.metadata, METADATA: text})
