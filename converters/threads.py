"""On how many threads torch computes. Factors are small: beside a busy program, threads that wait for one another take
ten times as long as one that does it all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_usual: ContextVar[int | None] = ContextVar("_usual", default=None)
"""The number outside of all blocks of `one_thread`; None outside of them."""


@contextmanager
def one_thread() -> Iterator[None]:
    """A block in which torch computes on one thread; afterwards on as many as before. A thread that starts meanwhile
    may keep the one."""
    with _threads(1):
        yield


@contextmanager
def usual_threads() -> Iterator[None]:
    """A block, within one of `one_thread`, in which torch computes on as many threads as outside: for large work."""
    with _threads(_usual.get()):
        yield


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    token = _usual.set(_usual.get() or before)
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _usual.reset(token)
