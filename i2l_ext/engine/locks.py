"""A lock on a file that the system lets go when its process ends, however it ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt

    def _take(stream: BinaryIO) -> None:
        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take(stream: BinaryIO) -> None:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Lock:
    """Held from ``acquire`` to ``release``, or to the end of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: BinaryIO | None = None

    def acquire(self) -> bool:
        """False where another process holds it, has taken the file away, or the file cannot be opened."""
        try:
            stream = self.path.open("ab")
        except (OSError, ValueError):  # the latter of a path that no disk can have
            return False
        try:
            _take(stream)
            self.path.stat()  # between open and lock the file may go: a lock on it keeps nobody out
        except OSError:
            stream.close()
            return False
        self._stream = stream
        return True

    def release(self) -> None:
        if self._stream:
            self._stream.close()
            self._stream = None
