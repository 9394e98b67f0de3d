"""Disks and systems as people have them, on this one: slow, far away, in small pieces, without the calls of Linux."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from unittest import mock

from i2l_ext.converters.files import TensorFile
from i2l_ext.weights import file_reader
from i2l_ext.weights import files as tensor_files


@dataclass
class SlowDisk:
    """``rate``: bytes a second, of all readers together; ``latency``: seconds until an answer begins, for each reader
    by itself; ``seek``: seconds until the head is elsewhere; ``most``: bytes that one call gives; ``calls``: the
    (position, bytes) that were given."""

    rate: float = float("inf")
    latency: float = 0.0
    seek: float = 0.0
    most: int | None = None
    calls: list[tuple[int, int]] = field(default_factory=list)
    _head: int = -1
    _busy: Lock = field(default_factory=Lock)

    def read(self, number: int, area: memoryview, position: int) -> int:
        """What ``os.preadv`` does, in this disk's time."""
        if self.latency:
            time.sleep(self.latency)
        area = area[: self.most]
        with self._busy:
            end = time.perf_counter() + len(area) / self.rate + self.seek * (position != self._head)
            count = PREADV(number, [area], position)
            self._head = position + count
            self.calls.append((position, count))
            time.sleep(max(end - time.perf_counter(), 0))
        return count

    @property
    def given(self) -> int:
        """Bytes that were read."""
        return sum(count for _, count in self.calls)


PREADV = getattr(os, "preadv", None)


class _Seeking:
    """A file as Windows has it: a position that all readers share."""

    def __init__(self, stream: Any, disk: SlowDisk) -> None:
        self.stream, self.disk, self.position = stream, disk, 0

    def seek(self, position: int) -> None:
        self.position = position

    def readinto(self, area: memoryview) -> int:
        count = self.disk.read(self.stream.fileno(), area, self.position)
        self.position += count
        return count

    def fileno(self) -> int:
        return self.stream.fileno()

    def close(self) -> None:
        self.stream.close()


SYSTEMS = ("page cache", "past it", "past it refused", "past it cut short", "without preadv")
"""How a system reads: as a small file on Linux; as a large one; where reads past the page cache fail (some network
shares, WSL's Windows drives); where they end within a page; as on Windows, and a Mac whose Python is old."""


@contextmanager
def system(kind: str, disk: SlowDisk) -> Iterator[None]:
    """Have files be read as ``kind`` (of SYSTEMS) does, from ``disk``."""
    plainly_opened: set[int] = set()
    plain_init = TensorFile.__init__

    def init(self: TensorFile, path: Any) -> None:
        plain_init(self, path)
        plainly_opened.add(self.fileno())
        if kind == "without preadv":
            self._stream = _Seeking(self._stream, disk)  # type: ignore[assignment]

    def preadv(number: int, areas: Sequence[memoryview], position: int) -> int:
        past = number not in plainly_opened
        if past and kind == "past it refused":
            raise OSError(22, "Invalid argument")
        [area] = areas
        if past and kind == "past it cut short":
            area = area[: len(area) // 2 + 7]
        return disk.read(number, area, position)

    def reopen(number: int) -> int:
        """Buffers and positions are as direct reads need them; whether the disk allows them is not asked here."""
        return os.dup(number)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(TensorFile, "__init__", init))
        patches.enter_context(mock.patch.object(tensor_files, "exceeds_page_cache", lambda size: "past" in kind))
        patches.enter_context(mock.patch.object(file_reader, "_reopen_direct", reopen))
        patches.enter_context(mock.patch.object(os, "preadv", preadv))
        if kind == "without preadv":
            del os.preadv
        yield
