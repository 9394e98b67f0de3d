"""The engine's process: one request from stdin, events to stdout, one JSON object a line.

Request ``{kind, folder, outcome, …}``; events ``{event: plan | step | done | failed | cancelled, …}``. The end of
stdin means stop: the one who asked wants no more of it, or is no more. What came of the work is also written to the
file ``outcome``, for the case that nobody is left to hear it, or it is too long for a line. The file ``lock`` in
``folder`` is locked as long as this process lives.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from i2l_ext import private_packages, runtime
from i2l_ext.converters.errors import Cancelled, UserError, one_line
from i2l_ext.engine.locks import Lock
from i2l_ext.worker import requests
from i2l_ext.worker.tasks import WORK, Request

PATIENCE = 10.0
"""Seconds after the end of stdin in which work is to wind down; then the process ends itself."""

EVERY = 0.1
"""Seconds between two reports of progress."""


class Teller:
    """The worker's side of the conversation."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._lock = out, threading.Lock()
        self.cancelled = threading.Event()
        self._titles: list[str] = []
        self._at, self._share, self._said = 0, 0.0, 0.0
        self._skipped: list[int] = []

    def say(self, event: str, **facts: Any) -> None:
        """Write an event. Where nobody listens any more the work is to stop."""
        line = json.dumps({"event": event, **facts}).encode() + b"\n"
        try:
            with self._lock:
                self._out.write(line)
                self._out.flush()
        except OSError:
            self.cancelled.set()

    def plan(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Tell what is to come: for each step ``title``, and as far as they are known ``bytes`` and ``layers``."""
        self._titles = [step["title"] for step in steps]
        self._at, self._share, self._skipped = 0, 0.0, []
        self.say("plan", steps=list(steps))

    def step(self, title: str) -> None:
        """A step begins. One that ended without any progress found its work done already."""
        if title in self._titles:
            index = self._titles.index(title)
            self._skipped += [self._at] if index > self._at > 0 and self._share == 0 else []
            self._at, self._share = index, 0.0
            self._report()

    def progress(self, share: float) -> None:
        """How much of the step is done, 0 to 1."""
        self._share = share
        if share >= 1 or time.monotonic() - self._said >= EVERY:
            self._report()

    def check(self) -> None:
        """Raises Cancelled."""
        if self.cancelled.is_set():
            raise Cancelled

    def _report(self) -> None:
        self._said = time.monotonic()
        self.say("step", step=self._at, share=self._share, cached=self._skipped)


def main() -> int:
    """Serve one request; 0 unless it failed."""
    private_packages.add_to_path()
    runtime.share()
    tell = Teller(_own_stdout())
    request: Request = {}
    try:
        request = requests.read(sys.stdin.buffer.readline())
        if folder := request.get("folder"):
            alive = Lock(Path(folder) / "lock")
            alive.acquire()
        threading.Thread(target=_watch, args=(tell,), daemon=True).start()
        work = WORK.get(request["kind"])
        if work is None:
            raise UserError("The engine does not know this kind of job. Restart the WebUI.")
        result = work(request, tell)
        return _end(request, tell, "done", result=result)
    except UserError as error:
        return _end(request, tell, "failed", error=str(error))
    except BaseException as error:  # noqa: BLE001
        # whatever it is, the page is to show it; the traceback goes to stderr, whose end is shown with it
        if isinstance(error, Cancelled | KeyboardInterrupt) or tell.cancelled.is_set():
            return _end(request, tell, "cancelled")
        traceback.print_exc()
        return _end(request, tell, "failed", error=one_line(f"{type(error).__name__}: {error}".strip(": ")))


def _end(request: Request, tell: Teller, event: str, **facts: Any) -> int:
    if outcome := request.get("outcome"):
        with suppress(OSError):
            part = Path(f"{outcome}.part")
            part.write_text(json.dumps({"event": event, **facts}), encoding="utf-8")
            part.replace(outcome)
    tell.say(event, **facts)
    return int(event == "failed")


def _own_stdout() -> BinaryIO:
    """stdout for events alone: what libraries print goes to stderr."""
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return own


def _watch(tell: Teller) -> None:
    """Wait for the end of stdin; then stop the work, and the process if the work does not listen."""
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    tell.cancelled.set()
    time.sleep(PATIENCE)
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
