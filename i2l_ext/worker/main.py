"""The engine's process: one message from stdin, events to stdout, one JSON object a line.

The end of stdin means stop: the one who asked wants no more of it, or is gone. What came of the work is also written
to the file ``outcome``, for the case that nobody is left to hear it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from i2l_ext import private_packages, runtime
from i2l_ext.converters import atomic
from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.engine.locks import Claim, Lock
from i2l_ext.operations import Context
from i2l_ext.worker.failures import failure_of
from i2l_ext.worker.messages import outcome_of, read_message
from i2l_ext.worker.reporter import EventReporter
from i2l_ext.worker.tasks import run_task

PATIENCE = 10.0
"""Seconds after the end of stdin in which work is to wind down; then the process ends itself."""


def main() -> int:
    """Serve one message; 0 unless it failed."""
    private_packages.add_to_path()
    runtime.configure_process()
    reporter = EventReporter(_own_stdout())
    line = sys.stdin.buffer.readline()
    outcome = outcome_of(line)
    reporter.keep = lambda result: _write_outcome(outcome, "done", result=result)
    try:
        message = read_message(line)
        if message.folder:
            alive = Lock(message.folder / "lock")
            alive.acquire()
            reporter.claim = Claim.on_saving(message.folder)
        threading.Thread(target=_watch, args=(reporter,), daemon=True).start()
        result = run_task(message, Context(message.options, reporter))
        return _end(outcome, reporter, "done", result=result)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the page is to show it
        if reporter.saved is not None:  # its files are there: whatever was to follow is not what was asked for
            traceback.print_exc()
            return _end(outcome, reporter, "done", result=reporter.saved)
        if not isinstance(error, UserError):
            if isinstance(error, Cancelled | KeyboardInterrupt) or reporter.cancelled():
                return _end(outcome, reporter, "cancelled")
            traceback.print_exc()  # to stderr, whose end is shown with the line
        text, code = failure_of(error)
        return _end(outcome, reporter, "failed", error=text, code=code)


def _end(outcome: Path | None, reporter: EventReporter, event: str, **facts: Any) -> int:
    _write_outcome(outcome, event, **facts)
    reporter.send(event, **facts)
    return int(event == "failed")


def _write_outcome(outcome: Path | None, event: str, **facts: Any) -> None:
    if outcome:
        with suppress(OSError):
            atomic.replace_text(outcome, json.dumps({"event": event, **facts}))


def _own_stdout() -> BinaryIO:
    """stdout for events alone: what libraries print goes to stderr."""
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return own


def _watch(reporter: EventReporter) -> None:
    """Wait for the end of stdin; then stop the work, and the process if the work does not listen."""
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    reporter.stop.set()
    time.sleep(PATIENCE)
    reporter.wait_for_saving()
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
