"""Reads the bytes of a model file, for several threads at once, and past the page cache where that is better.

A file that is read once and is larger than what memory can spare pushes other files out of the page cache. Filling
the cache also takes processor time that the arithmetic needs. On Linux a program can read straight into its own pages
instead (O_DIRECT), in whole pages.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters.files import TensorFile

if TYPE_CHECKING:
    import torch

PAGE = 4096
"""Bytes. Addresses, file positions and lengths of direct reads must be multiples of it, on any disk."""

CACHE_SHARE = 0.5
"""How much of the available memory files may take as page cache. Larger files are read past it."""


def exceeds_page_cache(size: int) -> bool:
    """Whether files of ``size`` bytes together should be read past the page cache."""
    try:
        available = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux: there are no direct reads either
        return False
    return available is not None and size > CACHE_SHARE * 1024 * int(available[1])


def page_buffer(nbytes: int) -> torch.Tensor:
    """``nbytes`` uninitialised bytes that start on a page, for long use. In large pages where the system has them:
    direct reads into those cost less."""
    import torch

    if sys.platform == "linux":
        room = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without large pages
            room.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(room, dtype=torch.uint8)[:nbytes]
    else:  # noqa: RET505 - so that a check of types for Linux knows it is not for Linux
        return from_page_start(torch.empty(nbytes + PAGE, dtype=torch.uint8))[:nbytes]


def from_page_start(memory: torch.Tensor) -> torch.Tensor:
    """The part of ``memory``, bytes, from the first start of a page on."""
    return memory[-memory.data_ptr() % PAGE :]


class FileReader:
    """Reads an open file. ``direct``: past the page cache, where the system can."""

    def __init__(self, file: TensorFile, *, direct: bool = False) -> None:
        self.file = file
        self._direct = _reopen_direct(file.fileno()) if direct else None
        self._direct_failed = False  # once is enough: the next read would fail too, after half of its time

    @property
    def can_read_directly(self) -> bool:
        """Whether it reads past the page cache, as far as it knows."""
        return self._direct is not None and not self._direct_failed

    def close(self) -> None:
        """The file itself stays open."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def read(self, start: int, end: int, area: memoryview) -> None:
        """Put the bytes [start, end) of the file at ``area[start % PAGE:]``; ``area`` starts on a page of memory.

        The rest of the first and last page of ``area`` may be overwritten too. Raises UserError as TensorFile does.
        """
        lead, done = start % PAGE, 0
        wanted = area[lead : lead + end - start]
        if self._direct is not None and not self._direct_failed:
            done = min(max(_read_pages(self._direct, start - lead, end, area) - lead, 0), len(wanted))
            self._direct_failed = done < len(wanted)
        if done < len(wanted):
            self.file.read(start + done, wanted[done:])  # it tells what is wrong, if the plain way fails too
        else:
            self.file.check()


def _read_pages(number: int, start: int, end: int, area: memoryview) -> int:
    """Read whole pages from the disk until ``end``; how many bytes came. Fewer where the system or the disk cannot."""
    area, done = area[: -(-(end - start) // PAGE) * PAGE], 0
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a Python without preadv
            while start + done < end and done % PAGE == 0:
                count = os.preadv(number, [area[done:]], start + done)
                if not count:
                    break
                done += count
    return done


def _reopen_direct(number: int) -> int | None:
    """A second descriptor of the file, for direct reads; None where there are none."""
    if sys.platform == "linux":
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_DIRECT)
    return None
