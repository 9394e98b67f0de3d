"""One engine process, seen from outside: started, listened to, stopped, and its last words when it fails.

The two speak JSON lines. The first line to the child's stdin is the request; after it stdin stays open, and closing
it means "stop". Each line from its stdout is an event. Standard library only: this runs in the WebUI's process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from threading import Event, Thread, Timer
from typing import IO, Any, cast

import i2l_ext

ROOT = Path(i2l_ext.__file__).resolve().parent.parent

GRACE = 0.7
"""Seconds between "stop" and the kill. A cancel is to be over within one."""

LONGEST_LINE = 4 << 20
"""Bytes of an event. The largest, the result of an inspection, has some 100 kB."""

TAIL = 30
"""Lines of stderr that are kept."""

HINTS = (
    (r"out of memory|OutOfMemoryError|MemoryError|DefaultCPUAllocator|signal 9\b|CUBLAS_STATUS_ALLOC_FAILED",
     "Memory ran out. Close other programs, free the WebUI's VRAM (Settings), or set a memory bound."),
    (r"No space left|disk is full|Errno 28|Disk quota",
     "The disk is full. Free some space, or choose folders on another disk."),
    (r"weights are missing|i2l models download",
     "The model's weights are not here yet: open Models and download them, or try `mini`."),
    (r"No module named|ImportError|cannot import name",
     "A Python package is missing or too old. Restart the WebUI, which sets up the engine's own packages."),
    (r"CUDA error|no kernel image|NVIDIA driver",
     "The graphics card or its driver refused. Choose the device `cpu` in Settings to see whether that is the cause."),
)  # fmt: skip
"""Pattern in what a failed engine said -> what usually helps."""


def command() -> list[str]:
    """How the engine is started: with the WebUI's own Python, unless ``I2L_ENGINE_PYTHON`` names another. An embedded
    Python, as WebUIs for Windows bring, finds no module in the folder where it runs: it is told where ours are."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from i2l_ext.worker import main; sys.exit(main())"
    return [os.environ.get("I2L_ENGINE_PYTHON") or sys.executable, "-c", start]


def hint(text: str) -> str | None:
    """What usually helps against a failure with these words; None where nothing is known."""
    return next((help for pattern, help in HINTS if re.search(pattern, text, re.IGNORECASE)), None)


def heard(line: bytes) -> Any:
    """A JSON value without what JSON has not, though Python writes it: numbers that are none become null, and half
    characters, as in names of files that are not text, question marks. Raises ValueError, RecursionError."""
    return _sound(json.loads(line))


def _sound(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, list):
        return [_sound(one) for one in value]
    return {_sound(key): _sound(one) for key, one in value.items()} if isinstance(value, dict) else value


class Child:
    """A running engine. ``stop`` may be called from any thread, at any time, more than once; it does not block.
    Raises OSError where the engine cannot be started."""

    def __init__(self, request: Mapping[str, Any], command: Sequence[str], environment: Mapping[str, str]) -> None:
        line = json.dumps(request).encode() + b"\n"
        flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
        self.process = subprocess.Popen(
            list(command), cwd=ROOT, env={**os.environ, **environment}, creationflags=flags,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        pipes = self.process.stdin, self.process.stdout, self.process.stderr
        self._stdin, self._stdout, self._stderr = cast("tuple[IO[bytes], IO[bytes], IO[bytes]]", pipes)
        self._stopped = Event()
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._ears = Thread(target=self._listen, name="i2l-stderr", daemon=True)
        self._ears.start()
        Thread(target=self._ask, args=(line,), name="i2l-stdin", daemon=True).start()

    def events(self) -> Iterator[dict[str, Any]]:
        """What the child says, until it says no more. Whatever is no event counts as stderr."""
        while line := self._stdout.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := self._stdout.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                self.tail.append(f"(a line of more than {LONGEST_LINE >> 20} MB)")
                continue
            try:
                event = heard(line)
                if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                    raise ValueError
            except (ValueError, RecursionError):
                self.tail.append(line[:500].decode(errors="replace").rstrip())
                continue
            yield event

    def wait(self) -> int:
        """Its exit code. A child that has closed its stdout and still runs is not waited for long."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._ears.join(timeout=1)  # not for ever: a process that the engine has started may still hold its stderr
        self._stdout.close()
        self._stopped.set()
        return code

    def stop(self) -> None:
        """Ask it to stop; kill it if it does not."""
        self._stopped.set()
        timer = Timer(GRACE, self._kill)
        timer.daemon = True
        timer.start()

    def _kill(self) -> None:
        with suppress(OSError):
            if self.process.poll() is None:
                self.process.kill()

    def _ask(self, line: bytes) -> None:
        """Write the request and close stdin when it is time. On a thread: an engine that does not read keeps it."""
        # an engine that died at once: its exit code and its tail tell why. Windows says EINVAL of such a pipe
        with suppress(OSError), self._stdin:
            self._stdin.write(line)
            self._stdin.flush()
            self._stopped.wait()

    def _listen(self) -> None:
        with suppress(OSError), self._stderr:
            while line := self._stderr.readline(2000):
                # a progress bar writes over its line: only what it shows last counts
                if text := line.decode(errors="replace").rstrip().rpartition("\r")[2]:
                    self.tail.append(text)
