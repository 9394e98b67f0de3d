"""The bytes of a weight file, for several threads at once, and past the page cache where that would be in the way.

A file that is read once, from one end to the other, and is larger than what memory can spare only pushes other
things out of the page cache; and filling the cache takes processor time that the arithmetic wants. Linux lets a
program read straight into its own pages instead (O_DIRECT); whole pages at a time.
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
"""Bytes. What memory addresses, file positions and lengths of direct reads are multiples of, on any disk."""

SPARE = 0.5
"""The share of available memory that files may take as page cache; larger ones are read past it."""


def too_large_to_keep(size: int) -> bool:
    """Whether files of ``size`` bytes together had better stay out of the page cache."""
    try:
        available = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux: there are no direct reads either
        return False
    return available is not None and size > SPARE * 1024 * int(available[1])


def pages(nbytes: int) -> torch.Tensor:
    """``nbytes`` uninitialised bytes of memory from the border of a page on, to be used for long: in large pages where
    the system has them, which costs it less when a disk writes to them past the page cache."""
    import torch

    if sys.platform == "linux":
        room = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without large pages
            room.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(room, dtype=torch.uint8)[:nbytes]
    else:  # noqa: RET505 - so that a check of types for Linux knows it is not for Linux
        return on_a_page(torch.empty(nbytes + PAGE, dtype=torch.uint8))[:nbytes]


def on_a_page(memory: torch.Tensor) -> torch.Tensor:
    """What of ``memory``, bytes, comes after the first border of a page."""
    return memory[-memory.data_ptr() % PAGE :]


class Source:
    """An open file. ``direct``: read past the page cache, where the system can."""

    def __init__(self, file: TensorFile, *, direct: bool = False) -> None:
        self.file = file
        self._direct = _reopened(file.fileno()) if direct else None

    def close(self) -> None:
        """The file itself stays open."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def read(self, start: int, end: int, area: memoryview) -> None:
        """Put the bytes [start, end) of the file at ``area[start % PAGE:]``; ``area`` begins on a page of memory.

        The bytes of ``area`` around them, up to the borders of the pages, may become the file's too. Raises
        UserError as TensorFile does.
        """
        lead = start % PAGE
        wanted = area[lead : lead + end - start]
        if self._direct is None:
            self.file.read(start, wanted)
        elif _read_pages(self._direct, start - lead, end, area):
            self.file.check()
        else:
            self.file.read(start, wanted)


def _read_pages(number: int, start: int, end: int, area: memoryview) -> bool:
    """Read whole pages from the disk; False where that did not work, and the plain way will say why."""
    area, done = area[: -(-(end - start) // PAGE) * PAGE], 0
    if sys.platform == "linux":
        with suppress(OSError):
            while start + done < end:
                count = os.preadv(number, [area[done:]], start + done)
                done += count
                if not count or (count % PAGE and start + done < end):  # cut short
                    return False
            return True
    return False


def _reopened(number: int) -> int | None:
    """The same file once more, for direct reads; None where there is no such thing."""
    if sys.platform == "linux":
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_DIRECT)
    return None
