"""What went wrong, as a line and a code: of errors that are no UserError, too."""

from __future__ import annotations

import errno

from i2l_ext.converters.errors import UserError, one_line

FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})

WORDS = (
    ("out_of_memory", ("out of memory", "cublas_status_alloc_failed", "defaultcpuallocator", "can't allocate memory")),
    ("gpu_refused", ("cuda error", "no kernel image", "nvidia driver")),
)
"""Code -> words of a RuntimeError by which it is known: torch has no class of errors for each of them."""


def failure_of(error: BaseException) -> tuple[str, str]:
    """The line for the page, and its code. ``unexpected`` is the code of what nobody foresaw."""
    if isinstance(error, UserError):
        return str(error), error.code
    return one_line(f"{type(error).__name__}: {error}".strip(": ")), _code(error)


def _code(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out_of_memory"
    if isinstance(error, ImportError):
        return "package_missing"
    if isinstance(error, OSError) and error.errno in FULL:
        return "disk_full"
    text = str(error).lower()
    return next((code for code, words in WORDS if any(word in text for word in words)), "unexpected")
