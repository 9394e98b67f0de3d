"""A result that is kept for a moment, for what is asked at every keystroke."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class ShortCache(Generic[Key, Value]):
    """``find(key)``, kept for ``seconds`` or until another key is asked for. One thread computes it, others wait."""

    def __init__(self, find: Callable[[Key], Value], seconds: float) -> None:
        self._find, self._seconds, self._lock = find, seconds, Lock()
        self._kept: tuple[Key, float, Value] | None = None

    def __call__(self, key: Key) -> Value:
        with self._lock:
            if self._kept is None or self._kept[0] != key or time.monotonic() - self._kept[1] > self._seconds:
                value = self._find(key)
                self._kept = key, time.monotonic(), value  # timed from its end: a slow search is kept as long
            return self._kept[2]

    def clear(self) -> None:
        """Compute it again when asked next."""
        with self._lock:
            self._kept = None
