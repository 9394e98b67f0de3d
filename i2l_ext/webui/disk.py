"""What a disk refuses, in one line, for people who are not to know where things lie on this machine."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from i2l_ext.converters.errors import UserError

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


class DiskError(UserError):
    """``full``: there is no room left; otherwise something is not allowed, or broken."""

    def __init__(self, what: str, error: OSError) -> None:
        self.full = error.errno in _FULL
        reason = "the disk is full" if self.full else (error.strerror or type(error).__name__).lower()
        todo = "Make room on the disk" if self.full else "Put that right on the computer where this runs"
        super().__init__(f"{what}: {reason}. {todo}, then try again.")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Make a DiskError of an OSError. ``what`` could not be done, without a path."""
    try:
        yield
    except OSError as error:
        raise DiskError(what, error) from error
