"""The engine's jobs as the WebUI's process sees them: a queue, its progress, and what came of each job.

One job of a lane runs at a time, each in a child process of its own (process.py); the others wait. Every job has a
record on disk (records.py), so that the next process knows which jobs were cut off, and says so. Standard library only.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from i2l_ext.converters.errors import UserError
from i2l_ext.engine import process, records
from i2l_ext.engine.job import ENDED, Job
from i2l_ext.engine.locks import Lock

__all__ = ["ENDED", "Busy", "Job", "Queue", "state_folder"]

WAITING, KEPT = 20, 60
"""Jobs that may wait, and ended ones that are remembered."""

FLEETING, KEPT_FLEETING = frozenset({"look", "models"}), 10
"""Kinds whose results are read once, and how many ended ones are remembered: they push no other out."""

LAST = 30.0
"""Seconds for an engine that has outlived its WebUI to wind down; it gives itself 10."""


class Busy(UserError):
    """Too many jobs wait already."""


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
        self._changed = Condition()
        self._jobs: dict[str, Job] = {}
        self._children: dict[str, process.Child] = {}
        self._lanes: dict[str, Thread] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._lock = records.new_folder(folder)
        left = list(records.abandoned(folder))
        for job in sorted((job for _, jobs in left for job in jobs), key=lambda job: job.created):
            self._hidden(job)
            self._jobs[job.id] = job
            records.write_job(job, self.folder)
        for lock, jobs in left:  # only now: their jobs are on disk a second time
            if all(job.state in ENDED for job in jobs):
                records.remove_folder(lock)
            else:
                Thread(target=self._adopt, args=(lock, jobs), name="i2l-adopt", daemon=True).start()

    def submit(self, kind: str, title: str, request: Mapping[str, Any]) -> Job:
        """Put a job at the end of its lane. Raises Busy where too many wait."""
        id = secrets.token_hex(8)
        job = Job(id, kind, title, request, self.folder / id)
        with self._changed:
            if sum(other.state == "waiting" for other in self._jobs.values()) >= WAITING:
                raise Busy(f"{WAITING} jobs are waiting already. Wait for some of them, or cancel some.")
            if job.lane not in self._lanes:
                runner = Thread(target=self._run_lane, args=(job.lane,), name="i2l-jobs", daemon=True)
                runner.start()
                self._lanes[job.lane] = runner
            self._jobs[id] = job
            self._forget()
            records.write_job(job, self.folder)
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
            except BaseException as error:  # noqa: BLE001 - it comes from the host, whose lane must go on
                with self._changed:
                    if job.state not in ENDED:
                        self._end(job, "failed", error=f"The WebUI did not let it run: {type(error).__name__}: {error}")

    def _next(self, lane: str) -> Job | None:
        return next((job for job in self._jobs.values() if job.lane == lane and job.state == "waiting"), None)

    def _run(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        request = {**job.request, "kind": job.kind, "outcome": str(job.outcome), "folder": str(job.folder)}
        with self._changed:
            if job.state != "waiting":
                return
            job.state, job.started = "running", time.time()
            records.write_job(job, self.folder)
        try:  # without the lock: a start may take its time, and whoever asks how things stand is not to wait for it
            engine = process.Child(request, self._command or process.command(), self._environment())
        except OSError as error:
            with self._changed:
                self._end(job, "failed", error=f"The engine cannot be started: {error.strerror}.")
            return
        with self._changed:
            self._children[job.id] = engine
            if job.state == "stopping":  # cancelled meanwhile
                engine.stop()
        try:
            said = self._listen(job, engine)
        finally:
            code = engine.wait()
            with self._changed:
                del self._children[job.id]
        # a result too long for a line, and one that a kill cut short, are in the file
        outcome = records.parse_outcome(said) if said else records.read_outcome(job.outcome)
        with self._changed:
            if outcome is None:
                stopped = job.state == "stopping"
                outcome = {"state": "cancelled"} if stopped else {"state": "failed", "error": _ending(code)}
            self._end(job, **outcome, tail=list(engine.tail))

    def _listen(self, job: Job, engine: process.Child) -> Mapping[str, Any] | None:
        """Follow a job's progress to its end; the event of the end."""
        noted, last = time.monotonic(), None
        for event in engine.events():
            if event["event"] in ENDED:
                last = event
                continue
            with suppress(ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
                job.progress = job.progress.updated(event)
            if time.monotonic() - noted > 1:
                noted = time.monotonic()
                records.write_job(job, self.folder)
        return last

    def _adopt(self, lock: Lock, jobs: Sequence[Job]) -> None:
        """See jobs to their end whose engines have outlived their WebUI; then the folder of that WebUI goes."""
        end = time.monotonic() + LAST
        for job in jobs:
            while job.state not in ENDED:
                time.sleep(0.1)
                outcome = records.recovered_outcome(job) or (records.CUT_OFF if time.monotonic() > end else None)
                if outcome is not None:
                    with self._changed:
                        self._end(job, **outcome)
                    with suppress(Exception):  # it comes from the host
                        self._after(job)
        records.remove_folder(lock)

    def _end(self, job: Job, state: str, *, result: Any = None, error: str | None = None, tail: Any = ()) -> None:
        """To be called with the lock. What came of the job appears at once, and with nothing in it that is to be
        hidden."""
        ended = replace(job, state=state, ended=time.time(), result=result, error=error, tail=list(tail))
        if state == "failed":
            ended.hint = process.hint("\n".join((error or "", *ended.tail)))
        self._hidden(ended)
        vars(job).update(vars(ended))
        records.write_job(job, self.folder)
        self._changed.notify_all()

    def _hidden(self, job: Job) -> None:
        """Let the host hide what is not to be seen; where it cannot, nothing is seen."""
        try:
            self._hide(job)
        except Exception as error:  # noqa: BLE001 - it comes from the host, and somebody waits for the job
            job.result, job.tail = None, []
            if job.state in ("done", "failed"):
                job.state = "failed"
                job.error = f"The job ended, but what came of it cannot be shown ({type(error).__name__}). " \
                            "If it wrote a file, that is in its folder."  # fmt: skip

    def _forget(self) -> None:
        for fleeting, most in ((True, KEPT_FLEETING), (False, KEPT)):
            jobs = [job for job in self._jobs.values() if (job.kind in FLEETING) is fleeting and job.state in ENDED]
            for job in jobs[: max(len(jobs) - most, 0)]:
                del self._jobs[job.id]
                shutil.rmtree(job.folder, ignore_errors=True)
                for path in (self.folder / f"{job.id}.json", job.outcome):
                    with suppress(OSError):
                        path.unlink(missing_ok=True)


def state_folder() -> Path:
    """Where records and uploads are kept: with the checkout, or where it is not ours to write, with the system."""
    if named := os.environ.get("I2L_STATE"):
        return Path(named)
    own = process.ROOT / ".private"
    if (process.ROOT / "install.py").is_file() and os.access(own if own.exists() else process.ROOT, os.W_OK):
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
