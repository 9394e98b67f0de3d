"""One engine process, seen from outside: start it, read its events, stop it, keep the end of its output.

Both sides speak JSON lines. The first line to the engine's stdin is the message; after it stdin stays open, and closing
it means "stop". Each line from its stdout is an event. Standard library only: this runs in the WebUI's process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from threading import Event, Thread, Timer
from typing import IO, Any, cast

import i2l_ext
from i2l_ext.engine.locks import SAVING_SECONDS, Claim

ROOT = Path(i2l_ext.__file__).resolve().parent.parent

STOP_SECONDS = 0.7
"""Seconds between "stop" and the kill. A cancelled job must end within one."""

MAX_LINE_BYTES = 4 << 20
"""Longest event that is read. The largest in use, the result of an inspection, has about 100 kB."""

TAIL_LINES = 30
"""Lines of stderr that are kept."""


def command() -> list[str]:
    """How the engine is started: with the WebUI's own Python, unless ``I2L_ENGINE_PYTHON`` names another. An embedded
    Python, as WebUIs for Windows have, does not search its working directory for modules: it is told where ours are."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from i2l_ext.worker.main import main; sys.exit(main())"
    return [os.environ.get("I2L_ENGINE_PYTHON") or sys.executable, "-c", start]


def loads_finite_json(text: bytes) -> Any:
    """A JSON value without what JSON does not have, though Python writes it: NaN and infinity become None, and lone
    surrogates, as in names of files that are not text, question marks. Raises ValueError, RecursionError."""
    return _finite(json.loads(text))


def _finite(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return {_finite(key): _finite(one) for key, one in value.items()} if isinstance(value, dict) else value


class EngineProcess:
    """A running engine, started with one message. ``stop`` may be called from any thread, at any time, more than once;
    it does not block. ``tail``: the last lines of its stderr. Raises OSError where the engine cannot be started."""

    def __init__(self, message: Mapping[str, Any], command: Sequence[str], environment: Mapping[str, str]) -> None:
        line = json.dumps(message).encode() + b"\n"
        flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
        self.process = subprocess.Popen(
            list(command), cwd=ROOT, env={**os.environ, **environment}, creationflags=flags,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        pipes = self.process.stdin, self.process.stdout, self.process.stderr
        self._stdin, self._stdout, self._stderr = cast("tuple[IO[bytes], IO[bytes], IO[bytes]]", pipes)
        self._stopped = Event()
        self._claim = Claim.on_saving(Path(message["folder"])) if message.get("folder") else None
        self._killed = False
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._stderr_reader = Thread(target=self._read_stderr, name="i2l-stderr", daemon=True)
        self._stderr_reader.start()
        Thread(target=self._write_message, args=(line,), name="i2l-stdin", daemon=True).start()

    def events(self) -> Iterator[dict[str, Any]]:
        """Its events, until it closes its stdout. A line that is no event is kept like a line of stderr."""
        while line := self._stdout.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := self._stdout.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                self.tail.append(f"(a line of more than {MAX_LINE_BYTES >> 20} MB)")
                continue
            try:
                event = loads_finite_json(line)
                if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                    raise ValueError
            except (ValueError, RecursionError):
                self.tail.append(line[:500].decode(errors="replace").rstrip())
                continue
            yield event

    def wait(self) -> int:
        """Its exit code. An engine that has closed its stdout and still runs is killed after 5 seconds."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._stderr_reader.join(timeout=1)  # a process that the engine has started may hold its stderr longer
        self._stdout.close()
        self._stopped.set()
        return code

    def stop(self) -> None:
        """Close its stdin, which asks it to stop; kill it after STOP_SECONDS, but not while it gives files their
        names (see Claim)."""
        self._stopped.set()
        timer = Timer(STOP_SECONDS, self._kill)
        timer.daemon = True
        timer.start()

    def _kill(self) -> None:
        end = time.monotonic() + SAVING_SECONDS
        with suppress(OSError):
            while self.process.poll() is None:
                late = time.monotonic() > end
                if self._claim is None or self._claim.take() or late:
                    self._killed = not late
                    self.process.kill()
                    return
                time.sleep(0.05)

    @property
    def ended_saving(self) -> bool:
        """Of one that has ended: whether that was while it gave files their names, so that some may be there."""
        return self._claim is not None and not self._killed and self._claim.is_held

    def _write_message(self, line: bytes) -> None:
        """Write the message, and close stdin when it is time. On a thread: an engine that does not read blocks it."""
        # an engine that died at once: its exit code and its tail tell why. Windows says EINVAL of such a pipe
        with suppress(OSError), self._stdin:
            self._stdin.write(line)
            self._stdin.flush()
            self._stopped.wait()

    def _read_stderr(self) -> None:
        with suppress(OSError), self._stderr:
            while line := self._stderr.readline(2000):
                # a progress bar writes over its line: only what it shows last counts
                if text := line.decode(errors="replace").rstrip().rpartition("\r")[2]:
                    self.tail.append(text)
