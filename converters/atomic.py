"""Files that appear whole or not at all: written under a temporary name, then renamed in one step.

The temporary name lies in the same folder, begins with a dot and ends in ``.part``, so that no program lists it. The
file is locked while it is written. When a process is killed, the system releases its locks, so the next process that
writes to the folder can tell what is left over, and removes it. Standard library only.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

from .errors import UserError

CAN_LOCK = os.name == "posix"
"""On Windows an open file can neither be renamed nor removed, so temporary files are not locked there."""


class OpenFile(Protocol):
    """A file that someone reads."""

    path: Path

    def close(self) -> None: ...


OPEN_FILES: WeakSet[OpenFile] = WeakSet()
"""Those of this process that may be replaced while they are open, as when a LoRA is converted onto itself."""

if sys.platform != "win32":
    import fcntl

    def _lock(descriptor: int, *, wait: bool = False) -> None:
        """Lock an open file. Raises OSError on a disk without locks and, unless told to wait, where another process
        has the lock."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

else:

    def _lock(descriptor: int, *, wait: bool = False) -> None:
        raise OSError


STALE_AFTER = 60.0
"""Seconds without a change after which a temporary file that nobody has locked is removed."""

STALE_WITHOUT_LOCKS = 24 * 60 * 60.0
"""The same on systems and disks that have no locks."""


@contextmanager
def locked_temp_file(folder: Path) -> Iterator[Path]:
    """A new empty file in ``folder``. It is removed at the end unless it was renamed. Raises OSError."""
    path = temp_path(folder)
    with path.open("xb") as stream:
        try:
            if CAN_LOCK:
                with suppress(OSError):  # a disk without locks
                    _lock(stream.fileno())
            else:
                stream.close()
            yield path
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def locked_temp_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder in ``folder``. It is removed at the end with all its files unless it was renamed.

    Raises OSError.
    """
    path = temp_path(folder)
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY) if CAN_LOCK else None
    try:
        if descriptor is not None:
            with suppress(OSError):
                _lock(descriptor)
        yield path
    finally:
        if descriptor is not None:
            os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)


def temp_path(folder: Path) -> Path:
    """A new name in ``folder`` that no program lists and `remove_stale` knows. Nothing is made there yet."""
    return folder / f".i2l-{secrets.token_hex(8)}.part"


def remove_stale(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in ``folder``. Raises nothing: a failure here
    is no reason not to write."""
    with suppress(OSError):
        for path in folder.glob(".i2l-*.part"):
            with suppress(OSError):
                status = path.stat()
                age = time.time() - max(status.st_mtime, status.st_ctime)  # negative where the clock was set back
                if age > STALE_WITHOUT_LOCKS or (abs(age) > STALE_AFTER and _is_unlocked(path)):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_unlocked(path: Path) -> bool:
    """False on systems without locks. Raises OSError where a process has it locked, or where that is not known."""
    if not CAN_LOCK:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _lock(descriptor)
    finally:
        os.close(descriptor)
    return True


@contextmanager
def atomic_path(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to. It becomes ``path`` when the block ends well, else it is removed.

    Raises UserError where ``path`` exists already (unless ``overwrite``) or cannot be written.
    """
    try:
        if not overwrite and os.path.lexists(path):
            raise FileExistsError
        remove_stale(path.parent)
        with locked_temp_file(path.parent) as temp:
            yield temp
            flush(temp)
            place(temp, path, overwrite=overwrite)
    except FileExistsError:
        raise UserError(f"{path.name}: exists already. Choose another name, or say --overwrite.") from None
    except OSError as error:
        raise UserError(f"{path.name}: cannot be written to {path.parent} ({error.strerror}).") from None


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8; a reader finds the old file or the new one, whole.

    For small files that the program keeps for itself: settings, records. Raises OSError; then the old file remains.
    """
    remove_stale(path.parent)
    with locked_temp_file(path.parent) as temp:
        temp.write_text(text, encoding="utf-8")
        place(temp, path, overwrite=True)


def flush(path: Path) -> None:
    """Wait until the file is on the disk, so that a power cut leaves no half file under the final name.

    Raises OSError.
    """
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def place(temp: Path, path: Path, *, overwrite: bool) -> None:
    """Rename the finished ``temp`` to ``path`` in one step: a reader finds nothing, the old file or the new one.

    Raises FileExistsError where ``path`` exists already (unless ``overwrite``), and OSError.
    """
    if overwrite:
        if not CAN_LOCK:
            _close_readers(path)
        temp.replace(path)
        return
    try:
        os.link(temp, path)  # unlike a rename it never replaces, not even in a race
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links: FAT, some network shares
        with _folder_lock(path.parent):
            if os.path.lexists(path):  # Windows' rename sees that by itself
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            temp.rename(path)


def _close_readers(path: Path) -> None:
    """Close what reads the file ``path``, which is about to be another."""
    for file in list(OPEN_FILES):
        with suppress(OSError):  # either is gone
            if file.path.samefile(path):
                file.close()


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """One process of this machine at a time, where the system can lock a folder. Leaves no file behind."""
    with ExitStack() as opened:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            _lock(descriptor, wait=True)
        yield
