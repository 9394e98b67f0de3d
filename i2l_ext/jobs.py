"""The engine's jobs as the WebUI's process sees them: a queue, its progress, and what came of each job.

One job of a lane runs at a time, each in a child process of its own (child.py); the others wait. Every job has a
record on disk. A folder of records is locked as long as its process lives, so that the next process knows which jobs
were cut off, and says so. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from i2l_ext import child
from i2l_ext.converters.errors import UserError, one_line
from i2l_ext.locks import Lock

LANES = {"look": "pictures", "models": "look", "inspect": "look", "curve": "look", "doctor": "look"}
"""Kinds of jobs that take a moment and do not wait for the long ones."""

WAITING, KEPT = 20, 60
"""Jobs that may wait, and ended ones that are remembered."""

WINDOW = 20.0
"""Seconds of past progress from which the time left is estimated."""

ENDED = frozenset({"done", "failed", "cancelled"})


class Busy(UserError):
    """Too many jobs wait already."""


@dataclass
class Job:
    """One piece of work. ``state``: waiting, running, stopping, and then done, failed or cancelled. ``steps`` are
    as the worker plans them: ``{title, bytes, layers}``; ``step`` is the current one's index and ``share`` (0 to 1)
    how much of it is done. ``folder`` is the job's own, for what it draws. Times are seconds since the epoch."""

    id: str
    kind: str
    title: str
    request: Mapping[str, Any]
    folder: Path
    state: str = "waiting"
    steps: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    share: float = 0.0
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    result: Any = None
    error: str | None = None
    hint: str | None = None
    tail: list[str] = field(default_factory=list)
    past: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=400), repr=False)

    @property
    def lane(self) -> str:
        return LANES.get(self.kind, "work")

    @property
    def total(self) -> float:
        """How much of the whole is done, 0 to 1; steps count by the bytes they read."""
        if self.state == "done":
            return 1.0
        sizes = [max(step.get("bytes") or 0, 1) for step in self.steps]
        if not sizes:
            return 0.0
        return (sum(sizes[: self.step]) + sizes[self.step] * self.share) / sum(sizes)

    @property
    def left(self) -> float | None:
        """Seconds to go, from the rate of late; None while nothing can be said."""
        if self.state != "running" or len(self.past) < 2:
            return None
        (since, start), (now, end) = self.past[0], self.past[-1]
        rate = (end - start) / (now - since) if now - since >= 1 else 0
        return (1 - end) / rate if rate > 0 and end - start > 0.001 else None

    def view(self) -> dict[str, Any]:
        """The job for a page, a program or a record."""
        step = self.steps[self.step] if self.steps else None
        end = self.ended or time.time()
        return {
            "id": self.id, "kind": self.kind, "title": self.title, "state": self.state,
            "share": round(self.total, 4), "seconds": round(max(end - self.started, 0.0), 1) if self.started else 0.0,
            "left": None if self.left is None else round(self.left, 1),
            "step": None if step is None else {
                **step, "number": self.step + 1, "of": len(self.steps), "share": round(self.share, 4)
            },
            "cached": [step["title"] for step in self.steps if step.get("cached")],
            "created": self.created, "started": self.started, "ended": self.ended,
            "result": self.result, "error": self.error, "hint": self.hint, "tail": self.tail,
        }  # fmt: skip

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take in an event of the worker."""
        kind = event["event"]
        if kind == "plan":
            self.steps, self.step, self.share = [_planned(step) for step in event["steps"]], 0, 0.0
            self.past.clear()
        elif kind == "step" and self.steps:
            self.step = min(max(int(event["step"]), 0), len(self.steps) - 1)
            self.share = min(max(float(event["share"]), 0.0), 1.0)
            for index in event.get("cached", ()):
                self.steps[index]["cached"] = True
                self.past.clear()  # what is skipped says nothing of the rate
            now = time.monotonic()
            while len(self.past) > 2 and now - self.past[0][0] > WINDOW:
                self.past.popleft()
            self.past.append((now, self.total))
        elif kind in ENDED:
            said = event.get("error")
            self.state, self.result = kind, event.get("result")
            self.error = None if said is None else one_line(str(said))


def _planned(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step as the worker plans it. Raises what a wrong one raises."""
    size = step.get("bytes")
    return {**step, "title": str(step["title"]), "bytes": None if size is None else max(int(size), 0)}


class Queue:
    """The jobs of one WebUI process. ``around(job)`` gives a context in which the job runs; ``after(job)`` is called
    when it has ended. ``environment`` gives variables for the engine, asked anew for every job. ``hide(job)`` takes
    out of an ended job what a client is not to see."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str] | None = None,
        *,
        environment: Callable[[], Mapping[str, str]] = dict,
        around: Callable[[Job], AbstractContextManager[Any]] = lambda job: nullcontext(),
        after: Callable[[Job], None] = lambda job: None,
        hide: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self._command, self._environment, self._around, self._after = command, environment, around, after
        self._hide = hide
        self._changed = threading.Condition()
        self._jobs: dict[str, Job] = {}
        self._children: dict[str, child.Child] = {}
        self._lanes: dict[str, threading.Thread] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for job in sorted(_recover(folder), key=lambda job: job.created):
            self._hide(job)
            self._jobs[job.id] = job
        self.folder = folder / f"{int(time.time())}-{secrets.token_hex(4)}"
        self.folder.mkdir()
        self._lock = Lock(self.folder / "lock")
        self._lock.acquire()
        for job in self._jobs.values():  # the folder they were found in is gone
            self._record(job)

    def submit(self, kind: str, title: str, request: Mapping[str, Any]) -> Job:
        """Put a job at the end of its lane. Raises Busy where too many wait."""
        id = secrets.token_hex(8)
        job = Job(id, kind, title, request, self.folder / id)
        with self._changed:
            if sum(other.state == "waiting" for other in self._jobs.values()) >= WAITING:
                raise Busy(f"{WAITING} jobs are waiting already. Wait for some of them, or cancel some.")
            self._jobs[id] = job
            self._forget()
            self._record(job)
            if job.lane not in self._lanes:
                runner = threading.Thread(target=self._run_lane, args=(job.lane,), name="i2l-jobs", daemon=True)
                self._lanes[job.lane] = runner
                runner.start()
            self._changed.notify_all()
        return job

    def find(self, id: str) -> Job | None:
        return self._jobs.get(id)

    def jobs(self) -> list[Job]:
        """Every job that is remembered, in the order in which they were asked for."""
        with self._changed:
            return list(self._jobs.values())  # not by the clock, which may jump

    def active(self) -> list[Job]:
        """Those that wait or run."""
        return [job for job in self.jobs() if job.state not in ENDED]

    def cancel(self, id: str) -> bool:
        """Whether there was something to stop. A running job is over within a second."""
        with self._changed:
            job = self._jobs.get(id)
            if job is None or job.state in ENDED:
                return False
            if job.state == "waiting":
                self._end(job, "cancelled")
            else:
                job.state = "stopping"
                if engine := self._children.get(id):
                    engine.stop()
            return True

    def wait(self, id: str, timeout: float | None = None) -> Job:
        """The job once it has ended. Raises TimeoutError."""
        job = self._jobs[id]
        with self._changed:
            if not self._changed.wait_for(lambda: job.state in ENDED, timeout):
                raise TimeoutError(f"The job {id} is still {job.state}.")
        return job

    def close(self) -> None:
        """Stop everything and take the records away. For tests, and for an orderly end."""
        for job in self.active():
            self.cancel(job.id)
        with suppress(TimeoutError):
            for job in self.active():
                self.wait(job.id, 5)
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run_lane(self, lane: str) -> None:
        while True:
            with self._changed:
                while (job := self._next(lane)) is None:
                    self._changed.wait()
            try:
                with self._around(job):
                    self._run(job)
                self._after(job)
            except Exception as error:  # noqa: BLE001 - it comes from the host, whose lane must go on
                with self._changed:
                    if job.state not in ENDED:
                        self._end(job, "failed", f"The WebUI did not let it run: {type(error).__name__}: {error}")

    def _next(self, lane: str) -> Job | None:
        return next((job for job in self._jobs.values() if job.lane == lane and job.state == "waiting"), None)

    def _run(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        request = {**job.request, "kind": job.kind, "outcome": str(self._outcome(job)), "folder": str(job.folder)}
        with self._changed:
            if job.state != "waiting":
                return
            job.state, job.started = "running", time.time()
            self._record(job)
            try:
                engine = child.Child(request, self._command or child.command(), self._environment())
            except OSError as error:
                self._end(job, "failed", f"The engine cannot be started: {error.strerror}.")
                return
            self._children[job.id] = engine
        noted, outcome = time.monotonic(), None
        for event in engine.events():
            if event["event"] in ENDED:
                outcome = event
                continue
            with self._changed, suppress(ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
                job.hear(event)
            if time.monotonic() - noted > 1:
                noted = time.monotonic()
                self._record(job)
        code = engine.wait()
        with self._changed:
            self._children.pop(job.id)
            job.tail = list(engine.tail)
            if outcome:
                job.hear(outcome)
                self._end(job, job.state, job.error)
            elif job.state == "stopping":
                self._end(job, "cancelled")
            else:
                self._end(job, "failed", _ending(code))

    def _end(self, job: Job, state: str, error: str | None = None) -> None:
        """To be called with the lock."""
        job.state, job.ended, job.error = state, time.time(), error
        if state == "failed":
            job.hint = child.hint("\n".join((error or "", *job.tail)))
        self._hide(job)
        self._record(job)
        self._changed.notify_all()

    def _record(self, job: Job) -> None:
        """On disk, whole; where the disk does not take it, the job goes on without."""
        path = self.folder / f"{job.id}.json"
        with suppress(OSError):
            part = path.with_suffix(".part")
            part.write_text(json.dumps(job.view()), encoding="utf-8")
            part.replace(path)

    def _outcome(self, job: Job) -> Path:
        """Where the engine writes what came of the job, for the case that nobody is left to hear it."""
        return self.folder / f"{job.id}.outcome.json"

    def _forget(self) -> None:
        ended = [job for job in self._jobs.values() if job.state in ENDED]
        for job in ended[: max(len(ended) - KEPT, 0)]:
            del self._jobs[job.id]
            shutil.rmtree(job.folder, ignore_errors=True)
            for path in (self.folder / f"{job.id}.json", self._outcome(job)):
                with suppress(OSError):
                    path.unlink(missing_ok=True)


def state_folder() -> Path:
    """Where records and uploads are kept: with the checkout, or where it is not ours to write, with the system."""
    if named := os.environ.get("I2L_STATE"):
        return Path(named)
    own = child.ROOT / ".private"
    if (child.ROOT / "install.py").is_file() and os.access(own if own.exists() else child.ROOT, os.W_OK):
        return own / "state"
    user = getattr(os, "getuid", lambda: "user")()
    folder = Path(tempfile.gettempdir()) / f"i2l-{user}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if os.name == "posix" and not _is_own(folder.lstat(), user):
        raise UserError(f"{folder} belongs to somebody else. Name a folder of your own in I2L_STATE.")
    return folder


def _is_own(status: os.stat_result, user: object) -> bool:
    """A folder, not a link that somebody laid there, which is the user's and into which no one else writes."""
    return stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o022


def _ending(code: int) -> str:
    if code < 0:
        return f"The engine was stopped from outside (signal {-code}). Nothing half-written was left behind."
    return f"The engine ended unexpectedly (code {code}). Nothing half-written was left behind."


def _recover(folder: Path) -> Iterator[Job]:
    """The jobs of processes that are gone. What an engine could still finish is done; the rest was cut off."""
    for old in sorted(path for path in folder.iterdir() if path.is_dir() and (path / "lock").is_file()):
        lock = Lock(old / "lock")
        if not lock.acquire():
            continue
        for record in sorted(old.glob("*.json")):
            with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
                if not record.name.endswith(".outcome.json"):
                    yield _read(record)
        lock.release()
        shutil.rmtree(old, ignore_errors=True)


_STATES = ENDED | {"waiting", "running", "stopping"}
_RECORDED: Mapping[str, Callable[[Any], bool]] = {
    "id": lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{1,64}", value) is not None,
    "kind": lambda value: isinstance(value, str),
    "title": lambda value: isinstance(value, str),
    "state": lambda value: isinstance(value, str) and value in _STATES,
    "created": lambda value: isinstance(value, float),
    "started": lambda value: value is None or isinstance(value, float),
    "ended": lambda value: value is None or isinstance(value, float),
    "error": lambda value: value is None or isinstance(value, str),
    "hint": lambda value: value is None or isinstance(value, str),
    "tail": lambda value: isinstance(value, list) and all(isinstance(line, str) for line in value),
}
"""What a record must look like: a disk may have damaged it."""


def _read(record: Path) -> Job:
    """The job of a record. Raises ValueError, LookupError or TypeError where it is damaged."""
    view = child.heard(record.read_bytes())
    if wrong := [name for name, test in _RECORDED.items() if not test(view[name])]:
        raise ValueError(f"{record}: {wrong[0]}")
    job = Job(view["id"], view["kind"], view["title"], {}, record.with_suffix(""))
    for name in ("state", "created", "started", "ended", "result", "error", "hint", "tail"):
        setattr(job, name, view[name])
    if job.state not in ENDED:
        job.ended = record.stat().st_mtime
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            job.hear(child.heard(record.with_suffix(".outcome.json").read_bytes()))
    if job.state not in ENDED:
        job.state = "failed"
        job.error = (
            "The WebUI was closed or stopped while this was at work; nothing half-written was left. Start again."
        )
    return job
