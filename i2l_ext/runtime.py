"""Settings of a process that must be made before torch is imported: how threads wait, and what freed memory does."""

import ctypes
import os
from collections.abc import Mapping
from contextlib import suppress

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8
"""glibc's numbers for ``mallopt``; all but the last are set in bytes."""

KEEP_FREED = {MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: (1 << 31) - 1, TOP_PAD: 1 << 26, ARENA_MAX: 1}
"""Freed memory stays with the process, and serves every thread. A layer takes and frees the same megabytes again and
again. To get them from the kernel each time, cleared page by page, took 7 % of the time of an encoder with five
pictures, and a tenth of the time of a training."""


def configure_process() -> None:
    """Make waiting threads of a matrix product sleep, and keep freed memory where the C library can.

    A spinning thread takes processor time from the thread that reads, and from other programs: encoding takes a third
    less time on a busy machine of two processors. What the user has set in the environment stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        set_malloc_options(KEEP_FREED)


def set_malloc_options(options: Mapping[int, int]) -> None:
    """Set options of glibc's allocator, {number for ``mallopt``: value}. Does nothing with another C library."""
    with suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for number, value in options.items():
            mallopt(number, value)
