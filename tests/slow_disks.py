"""Disks and systems as people have them, on this one: slow, far away, in small pieces, without the calls of Linux."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
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


class _Seeking(io.FileIO):
    """A file as Windows has it: whoever reads sets its position first."""

    disk = SlowDisk()

    def readinto(self, area: Any) -> int:
        count = self.disk.read(self.fileno(), memoryview(area), self.tell())
        self.seek(count, os.SEEK_CUR)
        return count


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
            seeking = type("Seeking", (_Seeking,), {"disk": disk})
            opened = Path.open

            def opens(self: Path, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
                weights = mode == "rb" and buffering == 0 and self.suffix == ".safetensors"
                return seeking(self) if weights else opened(self, mode, buffering, *rest, **named)

            patches.enter_context(mock.patch.object(Path, "open", opens))
        yield
