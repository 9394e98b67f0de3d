"""One job as the WebUI's process sees it: what was asked, its progress, its result. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ENDED = frozenset({"done", "failed", "cancelled"})

LANES = {
    "look": "pictures", "models": "look", "inspect": "look", "check": "look", "curve": "look", "doctor": "look",
    "library": "look", "trust": "look", "setup_plan": "look", "run": "train",
}  # fmt: skip
"""Lanes of the kinds of jobs that need not wait for the long ones: those that take a moment, and a trainer's, which
takes hours and computes in a program of its own."""

BRIEF = frozenset({"look", "models", "library"})
"""Kinds whose results are read once, by who asked."""

WINDOW = 20.0
"""Seconds of past progress from which the time left is estimated."""

MARKS = 400
"""Most moments of it that are kept."""

LARGEST = 1 << 60
"""Bytes of a step. A larger number is an error, and no share can be computed from it."""


@dataclass(frozen=True)
class Progress:
    """``steps`` are as the worker plans them: ``{id, title, bytes, layers}``, and ``cached`` where the result was in
    the cache. ``step`` is the index of the current one and ``share`` (0 to 1) how much of it is done. ``past`` are
    moments: (seconds of a steady clock, share of the whole).

    It is immutable, and a job replaces it as a whole: another thread sees a plan and a step that belong together."""

    steps: tuple[Mapping[str, Any], ...] = ()
    step: int = 0
    share: float = 0.0
    past: tuple[tuple[float, float], ...] = ()

    @property
    def total(self) -> float:
        """How much of the whole is done, 0 to 1; steps count by the bytes they read."""
        sizes = [max(step.get("bytes") or 0, 1) for step in self.steps]
        if not sizes:
            return 0.0
        return (sum(sizes[: self.step]) + sizes[self.step] * self.share) / sum(sizes)

    @property
    def left(self) -> float | None:
        """Seconds to go, from the rate of the last WINDOW seconds; None while it is unknown."""
        if len(self.past) < 2:
            return None
        (since, start), (now, end) = self.past[0], self.past[-1]
        rate = (end - start) / (now - since) if now - since >= 1 else 0
        return (1 - end) / rate if rate > 0 and end - start > 0.001 else None

    def current(self) -> dict[str, Any] | None:
        """The step for a page or a program: as planned, with its ``number`` from 1, ``of`` how many, ``share``."""
        if not self.steps:
            return None
        return {
            **self.steps[self.step], "number": self.step + 1, "of": len(self.steps), "share": round(self.share, 4)
        }  # fmt: skip

    def apply_event(self, event: Mapping[str, Any]) -> Progress:
        """The progress after an event of the worker. Raises ValueError, TypeError, LookupError, AttributeError or
        ArithmeticError for an event that is wrong."""
        if event["event"] == "plan":
            return Progress(tuple(_planned(step) for step in event["steps"]))
        if event["event"] != "step" or not self.steps:
            return self
        step = [one["id"] for one in self.steps].index(event["step"])
        cached = set(event.get("cached", ()))
        steps = tuple({**one, "cached": True} if one["id"] in cached else one for one in self.steps)
        past = self.past if steps == self.steps else ()  # what is skipped says nothing of the rate
        new = replace(self, steps=steps, step=step, share=min(max(float(event["share"]), 0.0), 1.0))
        now = time.monotonic()
        while len(past) > 2 and now - past[0][0] > WINDOW:
            past = past[1:]
        return replace(new, past=(*past, (now, new.total))[-MARKS:])


def _planned(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step as the worker plans it. Raises as ``apply_event`` does."""
    size = step.get("bytes")
    return {
        **step,
        "id": str(step["id"]),
        "title": str(step["title"]),
        "bytes": None if size is None else min(max(int(size), 0), LARGEST),
    }


@dataclass(frozen=True)
class Log:
    """What another program has said that a job runs: the end of its log, and (step, loss)."""

    lines: tuple[str, ...] = ()
    losses: tuple[tuple[int, float], ...] = ()

    @staticmethod
    def of_event(event: Mapping[str, Any]) -> Log:
        """Raises ValueError, TypeError or LookupError for an event that is wrong."""
        losses = tuple((int(step), float(loss)) for step, loss in event["losses"])
        return Log(tuple(map(str, event["lines"]))[-100:], losses[:1000])


@dataclass
class Job:
    """One piece of work. ``message`` is what the engine is sent (see queue.py). ``state``: waiting, running, stopping,
    and then done, failed or cancelled. ``code`` names the kind of failure and ``hint`` says what usually helps
    (failures.py). ``folder`` is the job's own, for files that it makes. ``was_cancelled``: somebody asked for its end,
    whatever came of that. ``log``: of a program that it runs, not for strangers. Times are seconds since the epoch."""

    id: str
    kind: str
    title: str
    message: Mapping[str, Any]
    folder: Path
    state: str = "waiting"
    progress: Progress = field(default_factory=Progress)
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    result: Any = None
    error: str | None = None
    code: str | None = None
    hint: str | None = None
    tail: list[str] = field(default_factory=list)
    was_cancelled: bool = False
    log: Log = Log()

    @property
    def request(self) -> Mapping[str, Any]:
        """The JSON of the request; {} of a job that another process has asked for."""
        return self.message.get("request", {})

    @property
    def lane(self) -> str:
        return LANES.get(self.kind, "work")

    @property
    def total(self) -> float:
        """How much of the whole is done, 0 to 1."""
        return 1.0 if self.state == "done" else self.progress.total

    @property
    def left(self) -> float | None:
        """Seconds to go; None while it is unknown."""
        return self.progress.left if self.state == "running" else None

    @property
    def outcome(self) -> Path:
        """Where the engine also writes its last event, in case nobody reads it."""
        return self.folder.with_name(f"{self.id}.outcome.json")

    def view(self) -> dict[str, Any]:
        """The job for a page, a program or a record, as it is at one moment."""
        now = copy(self)  # another thread may be changing it
        end, left, progress = now.ended or time.time(), now.left, now.progress
        return {
            "id": now.id, "kind": now.kind, "title": now.title, "state": now.state,
            "share": round(now.total, 4), "seconds": round(max(end - now.started, 0.0), 1) if now.started else 0.0,
            "left": None if left is None else round(left, 1), "step": progress.current(),
            "cached": [step["title"] for step in progress.steps if step.get("cached")],
            "created": now.created, "started": now.started, "ended": now.ended,
            "result": now.result, "error": now.error, "code": now.code, "hint": now.hint, "tail": now.tail,
        }  # fmt: skip
