"""What an operation is given beside its request: how to compute, and whom to tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from i2l_ext.converters.errors import Cancelled
from i2l_ext.requests import EngineOptions


@dataclass(frozen=True)
class Step:
    """A part of an operation that takes its time. ``bytes`` are read in it, ``layers`` computed, as far as known."""

    id: str
    title: str
    bytes: int | None = None
    layers: int | None = None

    def json(self) -> dict[str, str | int]:
        """What is known of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Reporter:
    """Who is told how far an operation is, and may stop it. This one tells nobody and never stops.

    All methods are called on the thread that computes.
    """

    def plan(self, steps: Sequence[Step]) -> None:
        """The steps to come, in order."""

    def begin(self, step: str) -> None:
        """The step with this id begins."""

    def progress(self, share: float) -> None:
        """How much of the step is done, 0 to 1."""

    def note(self, line: str) -> None:
        """Something a user should know that is no error."""

    def log(self, lines: Sequence[str], losses: Sequence[tuple[int, float]]) -> None:
        """The end of another program's log, and what it has said of its loss: (step, loss)."""

    def cancelled(self) -> bool:
        """Whether the user wants to stop."""
        return False

    def check(self) -> None:
        """Raises Cancelled when the user wants to stop."""
        if self.cancelled():
            raise Cancelled

    def begin_saving(self) -> None:
        """Files are about to get their names: until ``end_saving`` it is too late to stop. Raises Cancelled when the
        user wanted to stop before."""
        self.check()

    def end_saving(self, result: Mapping[str, Any]) -> None:
        """They have their names. ``result``, as JSON, is what has come of the operation so far, should it be stopped
        now."""


@dataclass(frozen=True)
class Context:
    """How an operation computes and whom it tells."""

    options: EngineOptions = field(default_factory=EngineOptions)
    reporter: Reporter = field(default_factory=Reporter)
