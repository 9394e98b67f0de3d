"""Locks between processes: one that the system lets go when its process ends, and one that stays."""

from __future__ import annotations

import sys
from contextlib import suppress
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


SAVING_SECONDS = 60.0
"""For which a claim on saving is respected: gigabytes reach a slow disk in that time, and one that hangs never."""


class Claim:
    """A file that one of several processes can make: the first one has the claim, until it releases it. Unlike a lock
    it needs nothing of the disk, and outlives its process: another can see that it was held to the end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def on_saving(cls, folder: Path) -> Claim:
        """The claim of the job that has this folder. The engine holds it while it gives files their names; who wants
        to kill the engine takes it first."""
        return cls(folder / "saving")

    def take(self) -> bool:
        """False where another has it. A disk that refuses the file decides nothing: then it is True."""
        try:
            self.path.open("xb").close()
        except FileExistsError:
            return False
        except (OSError, ValueError):  # the latter of a path that no disk can have
            pass
        return True

    def release(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    @property
    def is_held(self) -> bool:
        try:
            return self.path.exists()
        except (OSError, ValueError):
            return False
