"""How strongly each LoRA acts on each row of a batch, at a moment of the generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from i2l_ext.converters.errors import UserError


@dataclass(frozen=True)
class Strength:
    """LoRA weights on the ``positive`` and the ``negative`` branch, 0 for none. The LoRA acts from the share ``start``
    of the steps to the share ``stop``, 0 to 1."""

    positive: float = 1.0
    negative: float = 0.0
    start: float = 0.0
    stop: float = 1.0

    def at(self, positive: bool, progress: float) -> float:
        """The weight on a branch at a share of the steps: of N steps, step i of 0 to N - 1 begins at i / N."""
        if not self.start <= progress < self.stop:
            return 0.0
        return self.positive if positive else self.negative


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of a batch, ``start`` to ``end``, on which every LoRA has the same of the ``weights``."""

    start: int
    end: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class RowWeights:
    """The weights of all LoRAs on ``count`` rows: the runs on which some LoRA acts, in order."""

    count: int
    runs: tuple[Run, ...]

    def runs_of(self, rows: int, name: str) -> tuple[Run, ...]:
        """The runs of a layer whose input has so many rows. Where all rows have the same weights it may have any
        number; elsewhere another number raises UserError with the layer's ``name``."""
        if rows == self.count or not self.runs:
            return self.runs
        if self.runs[0].end - self.runs[0].start == self.count:
            return (Run(0, rows, self.runs[0].weights),)
        raise UserError(
            f"{name}: has {rows} rows for a batch of {self.count}, so the branches cannot be told apart there. "
            "Predict the two branches one after the other, or leave this layer out of the LoRA."
        )


def row_weights(strengths: Sequence[Strength], positive: Sequence[bool], progress: float) -> RowWeights:
    """The weights where row i belongs to the positive branch if ``positive[i]``."""
    by_branch = {branch: tuple(one.at(branch, progress) for one in strengths) for branch in {*positive}}
    runs, start = [], 0
    for weights, rows in groupby(by_branch[branch] for branch in positive):
        end = start + len(list(rows))
        if any(weights):
            runs.append(Run(start, end, weights))
        start = end
    return RowWeights(len(positive), tuple(runs))
