"""How the processors are shared, and not kept busy for nothing. Import before torch."""

import ctypes
import os
from collections.abc import Mapping
from contextlib import suppress

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8
"""glibc's numbers for ``mallopt``; all but the last are set in bytes."""

KEPT = {MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: (1 << 31) - 1, TOP_PAD: 1 << 26, ARENA_MAX: 1}
"""What is freed stays at hand, on every thread. A layer takes and frees the same megabytes again and again; to get
them from the kernel each time, page by page and cleared, was 7 % of the time that five pictures took in an encoder,
and a tenth of that of a training."""


def share() -> None:
    """Have threads of a matrix product that wait for each other sleep, not spin: another thread reads meanwhile, and
    other programs have work too. On a busy machine of two processors encoding took a third less time. And keep freed
    memory at hand, where the C library can. A user's own choice of either stands."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        allocate(KEPT)


def allocate(settings: Mapping[int, int]) -> None:
    """Give glibc settings of its allocator, as ``mallopt`` takes them; nothing where the C library is another."""
    with suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for what, value in settings.items():
            mallopt(what, value)
