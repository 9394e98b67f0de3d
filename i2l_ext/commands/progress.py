"""Progress on stderr: one bar a step, none where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from i2l_ext.weights.compute import Callbacks


@contextmanager
def bars() -> Iterator[Callbacks]:
    """Callbacks that show a bar for each step. Ctrl-C stops by itself."""
    from tqdm import tqdm

    from i2l_ext.weights.compute import Callbacks

    bar: tqdm | None = None

    def step(title: str) -> None:
        nonlocal bar
        if bar is not None:
            bar.close()
        bar = tqdm(
            desc=f"{title:24}", total=1.0, leave=False, file=sys.stderr, disable=None,
            bar_format="{desc} {percentage:3.0f}% {bar} {elapsed}<{remaining}",
        )  # fmt: skip

    def progress(share: float) -> None:
        if bar is not None:
            bar.update(max(share - bar.n, 0))

    try:
        yield Callbacks(step, progress)
    finally:
        if bar is not None:
            bar.close()
