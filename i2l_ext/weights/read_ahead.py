"""Reads model files into the page cache while the disk would have nothing to do.

That is so while torch and transformers are imported, some seconds in each process, and while an encoder computes. A
thread reads files from their start on, one after the other. What it has read by the time a file is opened for use is
taken from the page cache then; the rest is read as always. Importing this does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread

from i2l_ext.weights.file_reader import available_memory

PIECE = 1 << 20
"""Bytes read at once: few, so that they stay in the processor's cache, and that a slow disk can be stopped."""

SHARE = 0.25
"""How much of the available memory is read ahead at most."""

FileIdentity = tuple[int, int]
"""Device and number of a file."""


class ReadAhead:
    """One thread at a time. How far each file was read is kept until the process ends."""

    def __init__(self) -> None:
        self._lock, self._read = Lock(), dict[FileIdentity, int]()
        self._wanted: frozenset[FileIdentity] = frozenset()

    def begin(self, paths: Sequence[Path]) -> None:
        """Read these in place of what is being read, until one of them is opened for use. Files that cannot be read
        are left out: whoever opens them for use tells of it."""
        found = {}
        for path in paths:
            with suppress(OSError):
                status = path.stat()
                found[(status.st_dev, status.st_ino)] = path
        wanted = frozenset(found)
        with self._lock:
            self._wanted = wanted
        room = int(SHARE * (available_memory() or 0))
        Thread(target=self._work, args=(found, wanted, room), name="i2l-read-ahead", daemon=True).start()

    def opened(self, number: int) -> int:
        """How many bytes from its start on the open file ``number`` were read ahead. Reading of its group ends."""
        status = os.fstat(number)
        identity = status.st_dev, status.st_ino
        with self._lock:
            if identity in self._wanted:
                self._wanted = frozenset()
            return self._read.get(identity, 0)

    def _work(self, files: dict[FileIdentity, Path], wanted: frozenset[FileIdentity], room: int) -> None:
        buffer = memoryview(bytearray(PIECE))
        for identity, path in files.items():
            with suppress(OSError), path.open("rb", buffering=0) as stream:
                stream.seek(self._read.get(identity, 0))
                while room >= PIECE and self._wanted is wanted:
                    count = stream.readinto(buffer)
                    if not count:
                        break
                    room -= count
                    with self._lock:
                        self._read[identity] = stream.tell()


READ_AHEAD = ReadAhead()
"""That of this process."""
