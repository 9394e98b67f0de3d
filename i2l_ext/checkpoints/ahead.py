"""Files that are needed later are read into the page cache while the processor is busy with something else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.checkpoints.source import too_large_to_keep

if TYPE_CHECKING:
    from i2l_ext.checkpoints.stream import Run


@dataclass
class Ahead:
    """What is to be read of ``paths``, in order; of files that the page cache cannot hold, nothing is."""

    paths: Iterable[Path]

    def __post_init__(self) -> None:
        self._files = [(path, path.stat().st_size) for path in self.paths]
        self._done = 0

    def during(self, run: Callable[[str], Run], title: str) -> Callable[[str], Run]:
        """``run``, by the title of a step; but while that of ``title`` gets on, so does the reading."""

        def step(name: str) -> Run:
            plain = run(name)

            def progress(share: float) -> None:
                self.read(share)
                plain.progress(share)

            return replace(plain, progress=progress) if name == title else plain

        return step

    def read(self, share: float) -> None:
        """Have the system begin to read, up to that share of all. A hint: where there is no such call, nothing is
        lost."""
        if sys.platform == "win32" or not hasattr(os, "posix_fadvise"):
            return
        goal, before = share * sum(size for _, size in self._files), 0
        for path, size in self._files:
            start, end = max(self._done - before, 0), min(int(goal) - before, size)
            before += size
            if end > start and not too_large_to_keep(size):
                with suppress(OSError), path.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
        self._done = max(self._done, int(goal))
