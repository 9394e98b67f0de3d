"""The queue of jobs in the WebUI's process: progress, cancelling, results.

One job of a lane runs at a time, each in an engine process of its own (process.py); the others wait. Every job has a
record on disk (records.py), so that the next process knows which jobs were cut off, and goes on with those that
waited. Standard library only.

The message to an engine is one JSON object: ``protocol``, ``kind``, ``request`` and ``options`` (the JSON of a request
and of EngineOptions), ``folder`` (the job's own), ``outcome`` (the file for its last event), and what else the caller
adds (``draw``: try out a LoRA of the miniature). Its events: ``plan`` (``steps``: id, title, bytes, layers), ``step``
(``step``: id, ``share``, ``cached``: ids), ``note`` (``text``), ``log`` (``lines``, ``losses``), and at the end
``done`` (``result``), ``failed`` (``error``, ``code``) or ``cancelled``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from i2l_ext.converters.errors import UserError, one_line
from i2l_ext.engine import failures, process, records
from i2l_ext.engine.job import BRIEF, ENDED, Job, Log
from i2l_ext.engine.locks import Lock
from i2l_ext.engine.temp_folder import own_temp_folder
from i2l_ext.engine.turns import machines_turn
from i2l_ext.requests import PROTOCOL

__all__ = ["BRIEF", "ENDED", "Job", "Queue", "QueueFull", "state_folder"]

MAX_WAITING, MAX_KEPT = 20, 60
"""Jobs that may wait, and ended ones that are remembered."""

MAX_KEPT_BRIEF = 10
"""Ended jobs of brief kinds that are remembered: they do not displace the others."""

ORPHAN_SECONDS = 30.0
"""Seconds for an engine that has outlived its WebUI to end; it gives itself 10."""


class QueueFull(UserError):
    """Too many jobs are waiting."""

    def __init__(self) -> None:
        super().__init__(f"{MAX_WAITING} jobs are waiting already. Wait for some of them, or cancel some.", "busy")


class Queue:
    """The jobs of one WebUI process. A job runs within the context that ``run_in(job)`` gives; ``on_end(job)`` is
    called when it has ended. ``environment()`` gives variables for the engine, for each job anew. ``redact(job)``
    removes from an ended job what a client must not see."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str] | None = None,
        *,
        environment: Callable[[], Mapping[str, str]] = dict,
        run_in: Callable[[Job], AbstractContextManager[Any]] = lambda job: nullcontext(),
        on_end: Callable[[Job], None] = lambda job: None,
        redact: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self._command, self._environment = command, environment
        self._run_in, self._on_end, self._redact = run_in, on_end, redact
        self._changed = Condition()
        self._jobs: dict[str, Job] = {}
        self._engines: dict[str, process.EngineProcess] = {}
        self._lanes: dict[str, Thread] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._lock = records.new_folder(folder)
        left = list(records.abandoned(folder))
        for job in sorted((job for _, jobs in left for job in jobs), key=lambda job: job.created):
            self._redact_safely(job)
            self._jobs[job.id] = job
            if job.state == "waiting":
                job.folder = self.folder / job.id
            records.write_job(job, self.folder)
        for lock, jobs in left:  # only now that their jobs are recorded in our own folder
            if orphans := [job for job in jobs if job.state == "stopping"]:
                Thread(target=self._adopt, args=(lock, orphans), name="i2l-adopt", daemon=True).start()
            else:
                records.remove_folder(lock)
        for lane in dict.fromkeys(job.lane for job in self._jobs.values() if job.state == "waiting"):
            self._start_lane(lane)

    def submit(self, kind: str, title: str, message: Mapping[str, Any]) -> Job:
        """Put a job at the end of its lane. ``message``: ``request`` and ``options``; the queue adds the rest.

        Raises QueueFull where too many wait.
        """
        id = secrets.token_hex(8)
        job = Job(id, kind, title, message, self.folder / id)
        with self._changed:
            if sum(other.state == "waiting" for other in self._jobs.values()) >= MAX_WAITING:
                raise QueueFull
            self._start_lane(job.lane)
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
            return list(self._jobs.values())  # in the order of insertion: the clock may jump

    def active(self) -> list[Job]:
        """Those that wait or run."""
        return [job for job in self.jobs() if job.state not in ENDED]

    def ended(self, kinds: Collection[str]) -> frozenset[str]:
        """Ids of the jobs of these kinds that have ended, as far as they are remembered. Who compares it with an
        earlier one misses none, while ``on_end`` comes a moment after a job is seen to have ended."""
        return frozenset(job.id for job in self.jobs() if job.kind in kinds and job.state in ENDED)

    def cancel(self, id: str) -> bool:
        """Whether there was something to stop. A running job is over within a second, unless it is giving its files
        their names: then it is too late, and it will be done."""
        with self._changed:
            job = self._jobs.get(id)
            if job is None or job.state in ENDED:
                return False
            job.was_cancelled = True
            if job.state == "waiting":
                self._end(job, "cancelled")
            else:
                job.state = "stopping"
                records.write_job(job, self.folder)  # who finds it cut off knows that it was to be
                if engine := self._engines.get(id):
                    engine.stop()
            return True

    def give_up(self, id: str, error: str, code: str) -> None:
        """End a job that has not begun, as failed."""
        with self._changed:
            job = self._jobs.get(id)
            if job is not None and job.state == "waiting":
                self._end(job, "failed", error=error, code=code)

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

    def _start_lane(self, lane: str) -> None:
        if lane not in self._lanes:
            self._lanes[lane] = Thread(target=self._run_lane, args=(lane,), name="i2l-jobs", daemon=True)
            self._lanes[lane].start()

    def _run_lane(self, lane: str) -> None:
        while True:
            with self._changed:
                while (job := self._next(lane)) is None:
                    self._changed.wait()
            try:
                with self._run_in(job), self._turn(job):
                    self._run(job)
                self._on_end(job)
            except BaseException as error:  # noqa: BLE001 - it comes from the host, whose lane must go on
                with self._changed:
                    if job.state not in ENDED:
                        self._end(job, "failed", error=f"The WebUI did not let it run: {type(error).__name__}: {error}",
                                  code="host_refused")  # fmt: skip

    def _turn(self, job: Job) -> AbstractContextManager[Any]:
        """A long job waits for those of other programs on this machine."""
        return machines_turn(lambda: job.state == "waiting") if job.lane == "work" else nullcontext()

    def _next(self, lane: str) -> Job | None:
        return next((job for job in self._jobs.values() if job.lane == lane and job.state == "waiting"), None)

    def _run(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        message = {"protocol": PROTOCOL, "request": {}, "options": {}, **job.message, "kind": job.kind,
                   "folder": str(job.folder), "outcome": str(job.outcome)}  # fmt: skip
        with self._changed:
            if job.state != "waiting":
                return
            job.state, job.started = "running", time.time()
            records.write_job(job, self.folder)
        try:  # without the lock: a start may be slow, and nobody who polls must wait for it
            engine = process.EngineProcess(message, self._command or process.command(), self._environment())
        except OSError as error:
            with self._changed:
                self._end(job, "failed", error=f"The engine cannot be started: {error.strerror}.",
                          code="engine_not_started")  # fmt: skip
            return
        with self._changed:
            self._engines[job.id] = engine
            if job.state == "stopping":  # cancelled meanwhile
                engine.stop()
        try:
            last = self._listen(job, engine)
        finally:
            exit_code = engine.wait()
            with self._changed:
                del self._engines[job.id]
        # a result that is too long for a line, or that a kill cut short, is in the file
        outcome = records.parse_outcome(last) if last else records.read_outcome(job.outcome)
        with self._changed:
            if outcome is None and engine.ended_saving:
                outcome = dict(records.CUT_OFF_SAVING)
            elif outcome is None:
                stopped = job.state == "stopping"
                outcome = {"state": "cancelled"} if stopped else _unexpected_end(exit_code, engine.tail)
            self._end(job, **outcome, tail=[*engine.tail, *job.log.lines[-process.TAIL_LINES :]])

    def _listen(self, job: Job, engine: process.EngineProcess) -> Mapping[str, Any] | None:
        """Follow a job's progress; its last event, None where there is none."""
        noted, last = time.monotonic(), None
        for event in engine.events():
            if event["event"] in ENDED:
                last = event
                continue
            if event["event"] == "note":
                engine.tail.append(one_line(str(event.get("text"))))
                continue
            if event["event"] == "log":
                with suppress(ValueError, TypeError, LookupError):
                    job.log = Log.of_event(event)
                continue
            with suppress(ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
                job.progress = job.progress.apply_event(event)
            if time.monotonic() - noted > 1:
                noted = time.monotonic()
                records.write_job(job, self.folder)
        return last

    def _adopt(self, lock: Lock, jobs: Sequence[Job]) -> None:
        """Wait for jobs whose engines have outlived their WebUI; then remove the folder of that WebUI."""
        end = time.monotonic() + ORPHAN_SECONDS
        for job in jobs:
            while job.state not in ENDED:
                time.sleep(0.1)
                outcome = records.recovered_outcome(job) or (records.CUT_OFF if time.monotonic() > end else None)
                if outcome is not None:
                    with self._changed:
                        self._end(job, **outcome)
                    with suppress(Exception):  # raised by the host
                        self._on_end(job)
        records.remove_folder(lock)

    def _end(
        self, job: Job, state: str, *, result: Any = None, error: str | None = None, code: str | None = None,
        tail: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """To be called with the lock. The result appears at once, and already redacted."""
        ended = replace(job, state=state, ended=time.time(), result=result, error=error, tail=list(tail))
        if state == "failed":
            ended.code = code or failures.diagnose([error or "", *tail]) or "unexpected"
            ended.hint = failures.HINTS.get(ended.code)
        self._redact_safely(ended)
        vars(job).update(vars(ended))
        records.write_job(job, self.folder)
        self._changed.notify_all()

    def _redact_safely(self, job: Job) -> None:
        """Redact an ended job; where that fails, nothing of its result is shown."""
        try:
            self._redact(job)
        except Exception as error:  # noqa: BLE001 - it comes from the host, and somebody waits for the job
            job.result, job.tail = None, []
            if job.state in ("done", "failed"):
                job.state, job.code = "failed", "not_shown"
                job.error = f"The job ended, but what came of it cannot be shown ({type(error).__name__}). " \
                            "If it wrote a file, that is in its folder."  # fmt: skip

    def _forget(self) -> None:
        for brief, most in ((True, MAX_KEPT_BRIEF), (False, MAX_KEPT)):
            jobs = [job for job in self._jobs.values() if (job.kind in BRIEF) is brief and job.state in ENDED]
            for job in jobs[: max(len(jobs) - most, 0)]:
                del self._jobs[job.id]
                shutil.rmtree(job.folder, ignore_errors=True)
                for path in (self.folder / f"{job.id}.json", job.outcome):
                    with suppress(OSError):
                        path.unlink(missing_ok=True)


def state_folder() -> Path:
    """Where records and uploads are kept: in the checkout; where that cannot be written, in the temporary folder."""
    if named := os.environ.get("I2L_STATE"):
        return Path(named)
    own = process.ROOT / ".private"
    if (process.ROOT / "install.py").is_file() and os.access(own if own.exists() else process.ROOT, os.W_OK):
        return own / "state"
    return own_temp_folder()


def _unexpected_end(exit_code: int, tail: Iterable[str]) -> dict[str, Any]:
    """The outcome of an engine that ended without its last event."""
    if exit_code < 0:
        how = f"was stopped from outside (signal {-exit_code})"
    else:
        how = f"ended unexpectedly (code {exit_code})"
    return {"state": "failed", "error": f"The engine {how}. Nothing half-written was left behind.",
            "code": failures.diagnose(tail, exit_code) or "engine_died"}  # fmt: skip
