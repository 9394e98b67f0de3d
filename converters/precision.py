"""What a narrower dtype loses of a LoRA's update, measured while the factors are made.

float16 has five bits of exponent: numbers under 6e-5 lose digits, those under 3e-8 become 0, and 65504 is the largest.
float32 and bfloat16 have eight, so that they only round, which is known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    import torch

    from .lora import Lora, Pair

NARROW = {"F16": 65504}
"""Dtype of few exponents (the format's name) -> its largest number."""

NOTICED = 0.0025
"""Share of the update, lost to a dtype, that is told. Rounding to bfloat16 costs as much."""

REFUSED = 0.01
"""Share of the update, lost to a dtype, from which on nothing is written unless it is asked for."""


@dataclass
class Losses:
    """What a dtype of few exponents loses of the factors that were cast to it so far. ``norms``: for every module, the
    squared Frobenius norms of its update and of the update's change."""

    norms: dict[str, tuple[float, float]] = field(default_factory=dict)

    def measure(self, path: str, before: Pair, after: Pair) -> None:
        """Note what the cast of a module's factors loses. Raises UserError for a number that is too large for it."""
        for old, new in zip(before, after, strict=True):
            if old.isfinite().all() and not new.isfinite().all():
                raise UserError(
                    f"{path}: {float(old.abs().max()):.3g} is too large for this dtype, whose largest number is "
                    f"{NARROW['F16']}. Say --dtype bf16 or fp32."
                )
        self.norms[path] = _squared_norms(before, after)

    def lost(self) -> float:
        """|before - after| / |before| of all updates together, in the Frobenius norm."""
        whole, change = (sum(values) for values in zip(*self.norms.values(), strict=True)) if self.norms else (0, 0)
        return math.sqrt(change / whole) if whole else 0.0

    def worst(self) -> tuple[str, float]:
        """The module that loses the largest share of its own update, and that share."""
        shares = {path: math.sqrt(change / whole) for path, (whole, change) in self.norms.items() if whole}
        return max(shares.items(), key=lambda item: item[1], default=("", 0.0))

    def line(self, name: str, *, lossy: bool = False) -> str | None:
        """One line about what ``name`` lost; None where that is not worth telling.

        Raises UserError where it is more than `REFUSED`, unless ``lossy``.
        """
        lost, (path, most) = self.lost(), self.worst()
        if max(lost, most) < NOTICED:
            return None
        line = (
            f"{name}: fp16 has too few exponents for this LoRA: {lost:.1%} of its update is lost ({most:.1%} of {path})"
        )
        if lost > REFUSED and not lossy:
            raise UserError(
                f"{line}; nothing was written. Say --dtype bf16 or fp32, or --lossy to write it all the same.", "lossy"
            )
        return f"{line}. bf16 and fp32 keep it."


def _squared_norms(before: Pair, after: Pair) -> tuple[float, float]:
    """Of up @ down, and of its change, which is (new up - up) @ new down + up @ (new down - down)."""
    import torch

    down, up, new_down, new_up = (factor.double() for factor in (*before, *after))
    change = torch.cat([new_down, new_down - down]), torch.cat([new_up - up, up], dim=1)
    return _squared_norm(down, up), _squared_norm(*change)


def _squared_norm(down: torch.Tensor, up: torch.Tensor) -> float:
    """The squared Frobenius norm of up @ down, from products of rank x rank."""
    return max(0.0, float(((up.mT @ up) * (down @ down.mT)).sum()))


HALVES = {"BF16": "bf16", "F16": "fp16"}
"""Dtypes of two bytes a number (the format's names) -> the words for them."""


def widened_line(before: Sequence[Lora], now: Lora) -> str:
    """A line to say where numbers of two bytes became numbers of four; "" where none did, and for no LoRA before."""
    had = {spec.dtype for lora in before for spec in lora.specs.values()}
    if not had or not had <= HALVES.keys() or all(spec.dtype != "F32" for spec in now.specs.values()):
        return ""
    return f"Written in fp32, as it was computed. In {HALVES[min(had)]} the file would be half as large."
