"""Errors of the disk as one line without paths, for people who must not learn where things lie on this machine."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from i2l_ext.converters.errors import UserError

_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


@contextmanager
def explain_disk_errors(what: str) -> Iterator[None]:
    """Turn an OSError into a UserError with the code ``disk_full`` or ``disk_refused``.

    ``what`` failed, as a clause without a path, such as "The settings could not be saved".
    """
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        reason = "the disk is full" if full else (error.strerror or type(error).__name__).lower()
        remedy = "Make room on the disk" if full else "Put that right on the computer where this runs"
        code = "disk_full" if full else "disk_refused"
        raise UserError(f"{what}: {reason}. {remedy}, then try again.", code) from error
