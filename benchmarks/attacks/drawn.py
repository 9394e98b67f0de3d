"""Inputs that hypothesis draws, outside of a test."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy

CHUNK = 200
"""Draws from one seed: the first ones of a seed are always the simplest."""


def drawn(strategy: SearchStrategy[Any], number: int, count: int = CHUNK) -> list[Any]:
    """``count`` draws at most, the same for the same ``number``; fewer where the strategy has no more to give."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            collect()
        except Unsatisfiable:
            return []
    return found


def maker(strategy: SearchStrategy[Any]) -> Callable[[Random], Any]:
    """An input from a random generator, a chunk drawn at a time."""
    waiting: list[Any] = []

    def make(random: Random) -> Any:
        if not waiting:
            waiting.extend(drawn(strategy, random.getrandbits(32)))
            random.shuffle(waiting)
        return waiting.pop()

    return make
