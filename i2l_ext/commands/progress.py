"""Progress of a run on stderr: one bar a step, none where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from i2l_ext.weights.stream import Run


@contextmanager
def bars(run: Run) -> Iterator[Callable[[str], Run]]:
    """By a step's title, ``run`` with a bar of that title for its progress."""
    from dataclasses import replace

    from tqdm import tqdm

    bar: tqdm | None = None

    def step(title: str) -> Run:
        nonlocal bar
        if bar is not None:
            bar.close()
        bar = tqdm(
            desc=f"{title:24}", total=1.0, leave=False, file=sys.stderr, disable=None,
            bar_format="{desc} {percentage:3.0f}% {bar} {elapsed}<{remaining}",
        )  # fmt: skip
        shown = bar

        def progress(share: float) -> None:
            shown.update(max(share - shown.n, 0))

        return replace(run, progress=progress)

    try:
        yield step
    finally:
        if bar is not None:
            bar.close()
