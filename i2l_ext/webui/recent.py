"""What was found a moment ago, for those who ask at every keystroke."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key")
Found = TypeVar("Found")


class Recent(Generic[Key, Found]):
    """``find(key)``, kept for ``seconds`` or until another key is asked for. One thread looks, others wait for it."""

    def __init__(self, find: Callable[[Key], Found], seconds: float) -> None:
        self._find, self._seconds, self._lock = find, seconds, Lock()
        self._kept: tuple[Key, float, Found] | None = None

    def __call__(self, key: Key) -> Found:
        with self._lock:
            if self._kept is None or self._kept[0] != key or time.monotonic() - self._kept[1] > self._seconds:
                found = self._find(key)
                self._kept = key, time.monotonic(), found  # a slow search is kept as long as a fast one
            return self._kept[2]

    def forget(self) -> None:
        """Look again when asked next."""
        with self._lock:
            self._kept = None
