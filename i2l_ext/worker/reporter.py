"""The worker's side of the conversation: events to stdout, one JSON object a line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from i2l_ext.converters.errors import Cancelled
from i2l_ext.engine.locks import SAVING_SECONDS, Claim
from i2l_ext.operations.context import Reporter, Step

EVERY = 0.1
"""Seconds between two reports of progress."""


class EventReporter(Reporter):
    """Writes every report as an event. Where nobody listens any more the work is to stop.

    ``claim`` is held while files get their names, so that nobody kills the engine then. ``keep`` writes down what has
    come of the job so far. ``saved`` is that, None before anything was saved.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._lock = out, threading.Lock()
        self.stop = threading.Event()
        self.claim: Claim | None = None
        self.keep: Callable[[Mapping[str, Any]], None] = lambda result: None
        self.saved: Mapping[str, Any] | None = None
        self._saving, self._idle = False, threading.Lock()
        self._steps: list[str] = []
        self._step, self._share, self._sent = "", 0.0, 0.0
        self._cached: list[str] = []

    def send(self, event: str, **facts: Any) -> None:
        """Write an event."""
        line = json.dumps({"event": event, **facts}).encode() + b"\n"
        try:
            with self._lock:
                self._out.write(line)
                self._out.flush()
        except OSError:
            self.stop.set()

    def plan(self, steps: Sequence[Step]) -> None:
        self._steps = [step.id for step in steps]
        self._step, self._share, self._cached = next(iter(self._steps), ""), 0.0, []
        self.send("plan", steps=[step.json() for step in steps])

    def begin(self, step: str) -> None:
        """A step begins. One that ended without any progress found its work in the cache."""
        if step in self._steps:
            index, last = self._steps.index(step), self._steps.index(self._step)
            self._cached += [self._step] if index > last > 0 and self._share == 0 else []
            self._step, self._share = step, 0.0
            self._report()

    def progress(self, share: float) -> None:
        self._share = share
        if share >= 1 or time.monotonic() - self._sent >= EVERY:
            self._report()

    def note(self, line: str) -> None:
        self.send("note", text=line)

    def log(self, lines: Sequence[str], losses: Sequence[tuple[int, float]]) -> None:
        self.send("log", lines=lines, losses=losses)

    def cancelled(self) -> bool:
        return self.stop.is_set()

    def begin_saving(self) -> None:
        if not self._saving:
            if not self._idle.acquire(blocking=False) or not (self.claim is None or self.claim.take()):
                raise Cancelled  # it is about to be killed
            self._saving = True
        if self.stop.is_set():
            self._release()
            raise Cancelled

    def end_saving(self, result: Mapping[str, Any]) -> None:
        self.saved = result
        self.keep(result)
        self._release()

    def wait_for_saving(self) -> None:
        """Return when nothing is being saved, and let nothing be saved any more; or after SAVING_SECONDS."""
        self._idle.acquire(timeout=SAVING_SECONDS)

    def _release(self) -> None:
        if self._saving:
            if self.claim:
                self.claim.release()
            self._saving = False
            self._idle.release()

    def _report(self) -> None:
        self._sent = time.monotonic()
        self.send("step", step=self._step, share=self._share, cached=self._cached)
