"""Progress of an operation on stderr: a bar for each step, none where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from i2l_ext.operations.context import Reporter, Step

if TYPE_CHECKING:
    from tqdm import tqdm

_SHARE = "{desc} {percentage:3.0f}% {bar} {elapsed}<{remaining}"


class Bars(Reporter):
    """A bar a step: in bytes for a transfer, which is a step that is planned alone, else in per cent. Notes are lines
    between the bars. Ctrl-C stops by itself."""

    def __init__(self) -> None:
        self._steps: dict[str, Step] = {}
        self._bar: tqdm | None = None

    def plan(self, steps: Sequence[Step]) -> None:
        self._steps = {step.id: step for step in steps}

    def begin(self, step: str) -> None:
        from tqdm import tqdm

        self.close()
        known = self._steps.get(step, Step(step, step))
        if known.bytes and len(self._steps) == 1:
            shown = {"desc": known.title, "total": known.bytes, "unit": "B", "unit_scale": True}
        else:
            shown = {"desc": f"{known.title:24}", "total": 1.0, "bar_format": _SHARE}
        self._bar = tqdm(**shown, leave=False, file=sys.stderr, disable=None)

    def progress(self, share: float) -> None:
        if self._bar is not None:
            self._bar.update(max(share * self._bar.total - self._bar.n, 0))

    def note(self, line: str) -> None:
        print(f"i2l: {line}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def bars() -> Iterator[Bars]:
    """Bars for one operation, closed at its end."""
    shown = Bars()
    try:
        yield shown
    finally:
        shown.close()
