"""Damage that needs no knowledge of a format."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from random import Random

ODD = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""Numbers at which programs go wrong."""

Damage = Callable[[Random, bytearray], bytes]


def _flip(random: Random, data: bytearray) -> bytes:
    for _ in range(random.choice((1, 1, 2, 8))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def _noise(random: Random, data: bytearray) -> bytes:
    at = random.randrange(len(data))
    data[at : at + random.choice((1, 4, 64))] = random.randbytes(random.choice((1, 4, 64)))
    return bytes(data)


def _number(random: Random, data: bytearray) -> bytes:
    form = random.choice(("<B", "<H", ">H", "<I", ">I"))
    at = random.randrange(max(1, min(len(data) - 4, random.choice((64, 400, len(data))))))
    raw = struct.pack(form, random.choice(ODD) & ((1 << 8 * struct.calcsize(form)) - 1))
    data[at : at + len(raw)] = raw
    return bytes(data)


def _cut(random: Random, data: bytearray) -> bytes:
    return bytes(data[: random.randrange(len(data))])


def _drop(random: Random, data: bytearray) -> bytes:
    at = random.randrange(len(data))
    del data[at : at + random.choice((1, 2, 4, 100, 1000))]
    return bytes(data)


def _double(random: Random, data: bytearray) -> bytes:
    start = random.randrange(len(data))
    piece = data[start : start + random.randrange(1, 400)]
    at = random.randrange(len(data))
    data[at:at] = piece * random.choice((1, 1, 2, 50))
    return bytes(data)


DAMAGES: Sequence[Damage] = (_flip, _flip, _noise, _number, _number, _cut, _drop, _double)


def damaged(random: Random, data: bytes, times: int = 1) -> bytes:
    """``data`` with a few of these damages; empty data stays empty."""
    for _ in range(times):
        if data:
            data = random.choice(DAMAGES)(random, bytearray(data))
    return data


def spliced(random: Random, first: bytes, second: bytes) -> bytes:
    """The head of one and the tail of the other."""
    return first[: random.randrange(len(first) + 1)] + second[random.randrange(len(second) + 1) :]
