"""What to read for a group of tensors: ranges of files, and where each goes in a buffer. Nothing is read here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from i2l_ext.converters.files import TensorFile, TensorInfo, torch_dtype
from i2l_ext.weights.file_reader import PAGE

READ_SIZE = (16 << 20) - 2 * PAGE
"""Bytes read at once, and so between two checks for cancellation. A buffer that holds them with the rest of their first
and last page has 16 MB: of pinned memory torch takes the next power of two."""


@dataclass(frozen=True)
class TensorSlot:
    """A tensor by its name in a group, and where it is. A packed one has ``scales``, each for ``group`` numbers."""

    name: str
    key: str
    file: TensorFile
    entry: TensorInfo
    scales: TensorSlot | None = None
    group: int = 0

    @property
    def start(self) -> int:
        """Its first byte in the file."""
        return self.file.header.data_start + self.entry.start

    @property
    def dtype(self) -> torch.dtype:
        """On disk."""
        return torch_dtype(self.entry.dtype)


@dataclass(frozen=True)
class SlotPart:
    """The bytes [start, stop) of a tensor."""

    slot: TensorSlot
    start: int
    stop: int


@dataclass(frozen=True)
class ReadRange:
    """The bytes [start, end) of a file, which go to ``at`` of a buffer; ``parts``: the tensors' bytes among them."""

    file: TensorFile
    start: int
    end: int
    at: int
    parts: tuple[SlotPart, ...]


def plan_group(slots: Sequence[TensorSlot]) -> list[ReadRange]:
    """The same for tensors that may be packed: scales are read too, and before what they scale. Where they lie behind
    it, as in some files of other programs, they are read first."""
    if any(slot.scales and slot.scales.start > slot.start for slot in slots):
        return plan_reads([slot.scales for slot in slots if slot.scales]) + plan_reads(slots)
    return plan_reads(with_scales(slots))


def with_scales(slots: Sequence[TensorSlot]) -> list[TensorSlot]:
    """Tensors and the scales of those that have some, in the order of the files."""
    both = [one for slot in slots for one in (slot, slot.scales) if one]
    order = list(dict.fromkeys(slot.file for slot in slots))
    return sorted(both, key=lambda slot: (order.index(slot.file), slot.start))


def plan_reads(slots: Iterable[TensorSlot]) -> list[ReadRange]:
    """The ranges to read for tensors in the order of the files, each of at most READ_SIZE bytes.

    Neighbours in a file are read together, and are neighbours in the buffer too. Each range has the same position
    within a page in the buffer as in its file, as direct reads need it.
    """
    ranges: list[ReadRange] = []
    for slot in slots:
        for offset in range(0, slot.entry.nbytes, READ_SIZE):
            part = SlotPart(slot, offset, min(offset + READ_SIZE, slot.entry.nbytes))
            start, end = slot.start + part.start, slot.start + part.stop
            last = ranges[-1] if ranges else None
            if last is not None and last.file is slot.file and last.end == start:
                if end - last.start <= READ_SIZE:
                    ranges[-1] = replace(last, end=end, parts=(*last.parts, part))
                    continue
                at = last.at + last.end - last.start
            else:
                used = last.at + last.end - last.start if last is not None else 0
                at = -(-used // PAGE) * PAGE + start % PAGE
            ranges.append(ReadRange(slot.file, start, end, at, (part,)))
    return ranges


def places_in_buffer(ranges: Iterable[ReadRange]) -> dict[str, int]:
    """By name the byte at which each tensor starts in the buffer, once its ranges are read. Empty ones are left out."""
    places: dict[str, int] = {}
    for one in ranges:
        for part in one.parts:
            places.setdefault(part.slot.name, one.at + part.slot.start + part.start - one.start)
    return places
