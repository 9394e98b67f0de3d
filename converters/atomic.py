"""Files on their way: beside where they will be, under a name that no host lists, held as long as they are written.

A process that is killed leaves them behind. The system lets its lock go with it, so that whoever writes there next
can tell them from those of a living process, and removes them.
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

from .errors import UserError

CAN_HOLD = os.name == "posix"
"""On Windows an open file can neither be renamed nor removed, so nothing can be held."""

if sys.platform != "win32":
    import fcntl

    def _hold(number: int, *, wait: bool = False) -> None:
        """Lock an open file. Raises OSError on a disk without locks, and, unless told to wait, where another process
        has it."""
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

else:

    def _hold(number: int, *, wait: bool = False) -> None:
        raise OSError


QUIET = 60.0
"""Seconds without a change after which a part that nobody holds is taken for one of a dead process."""

A_DAY = 24 * 60 * 60.0
"""Seconds after which any part is, on systems and disks without locks."""


@contextmanager
def held(folder: Path) -> Iterator[Path]:
    """A new empty file in ``folder`` that is gone at the end, unless it got another name. Raises OSError."""
    path = folder / f".i2l-{secrets.token_hex(8)}.part"
    with path.open("xb") as stream:
        try:
            if CAN_HOLD:
                with suppress(OSError):  # a disk without locks
                    _hold(stream.fileno())
            else:
                stream.close()
            yield path
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def held_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder with all that is in it. Raises OSError."""
    path = folder / f".i2l-{secrets.token_hex(8)}.part"
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY) if CAN_HOLD else None
    try:
        if descriptor is not None:
            with suppress(OSError):
                _hold(descriptor)
        yield path
    finally:
        if descriptor is not None:
            os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)


def reap(folder: Path) -> None:
    """Remove from ``folder`` what dead processes left. Never fails: it is no reason not to write."""
    with suppress(OSError):
        for path in folder.glob(".i2l-*.part"):
            with suppress(OSError):
                status = path.stat()
                quiet = time.time() - max(status.st_mtime, status.st_ctime)  # less than 0 where the clock was set back
                if quiet > A_DAY or (abs(quiet) > QUIET and _is_free(path)):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_free(path: Path) -> bool:
    """Whether nobody holds it. Raises OSError where somebody does, or where that cannot be known."""
    if not CAN_HOLD:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _hold(descriptor)
    finally:
        os.close(descriptor)
    return True


@contextmanager
def appearing(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path`` when the block ends well, and vanishes when not.

    Raises UserError where ``path`` exists already (unless ``overwrite``) or the disk refuses.
    """
    try:
        if not overwrite and os.path.lexists(path):
            raise FileExistsError
        reap(path.parent)
        with held(path.parent) as part:
            yield part
            with part.open("rb+") as stream:
                os.fsync(stream.fileno())
            place(part, path, overwrite=overwrite)
    except FileExistsError:
        raise UserError(f"{path.name}: exists already. Choose another name, or say --overwrite.") from None
    except OSError as error:
        raise UserError(f"{path.name}: cannot be written to {path.parent} ({error.strerror}).") from None


def place(part: Path, path: Path, *, overwrite: bool) -> None:
    """Give the finished ``part`` its name, in one step: whoever looks finds nothing, the old file or the new one.

    Raises FileExistsError where the name is taken.
    """
    if overwrite:
        part.replace(path)
        return
    try:
        os.link(part, path)  # unlike a rename it never replaces, not even in a race
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links: FAT, some network shares
        with _alone(path.parent):
            if os.path.lexists(path):  # Windows' rename sees that by itself
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            part.rename(path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time, as far as the system lets a folder be locked. Nothing is left behind."""
    with ExitStack() as held:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            held.callback(os.close, descriptor)
            _hold(descriptor, wait=True)
        yield
