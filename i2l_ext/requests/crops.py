"""Which square of a picture is taken, as a text: ``LEFT,TOP,SIDE`` in pixels of the upright picture, or ``centre``."""

from __future__ import annotations

import re
from typing import NamedTuple

from i2l_ext.converters.errors import UserError

CENTRE = "centre"
"""The largest square in the middle, which is taken unless another one is asked for."""

_SQUARE = re.compile(r"(0|[1-9][0-9]{0,8}),(0|[1-9][0-9]{0,8}),([1-9][0-9]{0,8})")


class Square(NamedTuple):
    """A square of a picture, in pixels of the upright picture, from its upper left corner."""

    left: int
    top: int
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom."""
        return self.left, self.top, self.left + self.side, self.top + self.side

    def __str__(self) -> str:
        return f"{self.left},{self.top},{self.side}"


def parse_crop(text: str) -> Square | None:
    """The square that a text names; None for the centre. Raises UserError. A picture may be too small for it."""
    found = _SQUARE.fullmatch(text)
    if found is None and text != CENTRE:
        raise UserError(
            f"{text[:40]!r} is no square of a picture. Give LEFT,TOP,SIDE in pixels, such as 300,0,900, or {CENTRE}.",
            "out_of_range",
        )
    return Square(*map(int, found.groups())) if found else None
