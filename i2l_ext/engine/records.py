"""What is kept of jobs on disk: records, the last events of engines, and the folders of processes that have ended.

Each process has a folder of its own, locked as long as it lives. Standard library only.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from i2l_ext.converters import atomic
from i2l_ext.converters.errors import one_line
from i2l_ext.engine import process
from i2l_ext.engine.job import BRIEF, ENDED, Job
from i2l_ext.engine.locks import Claim, Lock
from i2l_ext.requests import PROTOCOL

CUT_OFF: Mapping[str, Any] = {
    "state": "failed",
    "error": "The WebUI was closed or stopped while this was at work; nothing half-written was left. Start again.",
    "code": "cut_off",
}

CUT_OFF_SAVING: Mapping[str, Any] = {
    "state": "failed",
    "error": "This was stopped from outside while its files were being saved. Look into their folder: "
    "if they are there, they are whole.",
    "code": "cut_off",
}

LOST: Mapping[str, Any] = {
    "state": "failed",
    "error": "The WebUI was closed or stopped while this was waiting, and it could not be taken up again. "
    "Start it again.",
    "code": "lost",
}


def parse_outcome(event: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine's last event says of its job: ``state``, ``result``, ``error``, ``code``. Raises LookupError,
    TypeError, ValueError for another event."""
    if event["event"] not in ENDED:
        raise ValueError(event["event"])
    error, code = event.get("error"), event.get("code")
    return {"state": event["event"], "result": event.get("result"),
            "error": None if error is None else one_line(str(error)),
            "code": None if code is None else one_line(str(code))}  # fmt: skip


def read_outcome(path: Path) -> dict[str, Any] | None:
    """The same from the file that an engine leaves; None where it is missing or damaged."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return parse_outcome(process.loads_finite_json(path.read_bytes()))
    return None


def recovered_outcome(job: Job) -> Mapping[str, Any] | None:
    """The outcome of a job whose WebUI has ended; None while its engine is still ending."""
    lock = Lock(job.folder / "lock")  # held by the engine (worker/main.py) as long as it lives
    alive = lock.path.is_file() and not lock.acquire()
    lock.release()
    outcome = read_outcome(job.outcome)
    if outcome is None and alive:
        return None
    if outcome is None:
        return CUT_OFF_SAVING if Claim.on_saving(job.folder).is_held else CUT_OFF
    # an engine whose WebUI has gone stops by itself: then nobody had cancelled it
    return CUT_OFF if outcome["state"] == "cancelled" and not job.was_cancelled else outcome


def new_folder(folder: Path) -> tuple[Path, Lock]:
    """A new folder inside, and its lock. Before it is locked, another process that starts may take it for an abandoned
    one and remove it: then another is made."""
    for _ in range(5):
        own = folder / f"{int(time.time())}-{secrets.token_hex(4)}"
        own.mkdir()
        lock = Lock(own / "lock")
        if lock.acquire():
            return own, lock
        shutil.rmtree(own, ignore_errors=True)
    own.mkdir(exist_ok=True)  # a disk without locks
    return own, lock


def abandoned(folder: Path) -> Iterator[tuple[Lock, list[Job]]]:
    """The locks of folders whose processes have ended, taken, and their jobs. A job whose engine is still ending is
    "stopping"."""
    for old in sorted(path for path in folder.iterdir() if (path / "lock").is_file()):
        lock = Lock(old / "lock")
        if not lock.acquire():
            continue
        jobs = []
        for record in sorted(old.glob("*.json")):
            with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
                if not record.name.endswith(".outcome.json"):
                    jobs.append(read_job(record))
        yield lock, jobs


def remove_folder(lock: Lock) -> None:
    """Remove an abandoned folder. It stays locked until it is gone, so that no process can take it."""
    shutil.rmtree(lock.path.parent, ignore_errors=True)
    lock.release()
    shutil.rmtree(lock.path.parent, ignore_errors=True)  # Windows keeps a file that is open


def write_job(job: Job, folder: Path) -> None:
    """Write its record, whole. If the disk refuses, the job goes on without one."""
    with suppress(OSError):
        own = {"was_cancelled": job.was_cancelled, "protocol": PROTOCOL}
        message = {"message": job.message} if job.state == "waiting" else {}  # for who takes it up
        atomic.replace_text(folder / f"{job.id}.json", json.dumps(job.view() | own | message))


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
    "code": lambda value: value is None or isinstance(value, str),
    "hint": lambda value: value is None or isinstance(value, str),
    "tail": lambda value: isinstance(value, list) and all(isinstance(line, str) for line in value),
}
"""Field of a record -> whether a value is valid. A disk may have damaged it; an older version wrote no ``code``."""


def read_job(record: Path) -> Job:
    """The job of a record; one that was waiting still waits. Raises ValueError, LookupError or TypeError where it is
    damaged."""
    view = process.loads_finite_json(record.read_bytes())
    if not isinstance(view, dict):
        raise ValueError(f"{record}: no object")
    if wrong := [name for name, test in _RECORDED.items() if not test(view.get(name))]:
        raise ValueError(f"{record}: {wrong[0]}")
    job = Job(view["id"], view["kind"], view["title"], {}, record.with_suffix(""))
    for name in ("state", "created", "started", "ended", "result", "error", "code", "hint", "tail"):
        setattr(job, name, view.get(name))
    job.was_cancelled = view.get("was_cancelled") is True
    message = view.get("message") if view.get("protocol") == PROTOCOL else None
    if job.state == "waiting" and isinstance(message, dict) and job.kind not in BRIEF:
        job.message = message
    elif job.state not in ENDED:
        job.ended = record.stat().st_mtime
        outcome = LOST if job.state == "waiting" else recovered_outcome(job)
        vars(job).update(outcome or {"state": "stopping", "ended": None})
        if job.state == "failed":
            job.ended = time.time()  # nobody could be told before
    return job
