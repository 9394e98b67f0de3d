"""Threads for work that is shared out: each computes on one processor, and none waits for another between two steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import torch


def worker_threads(name: str, count: int) -> ThreadPoolExecutor:
    """A pool of ``count`` threads on each of which torch uses one processor. Shut it down."""
    return ThreadPoolExecutor(count, name, _use_one_processor, (torch.get_num_threads(),))


def _use_one_processor(others: int) -> None:
    """Make torch use one processor on this thread, and ``others`` on threads that start later, as before.

    The number holds for the thread that sets it and for all that start later. So a thread that does nothing else sets
    the old number again.
    """
    torch.get_num_threads()  # else a thread's first operation sets the number anew
    torch.set_num_threads(1)
    restore = Thread(target=torch.set_num_threads, args=(others,))
    restore.start()
    restore.join()
