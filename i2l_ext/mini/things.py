"""The things that pictures of mini's world show, as fields around (0, 0), with y downwards.

A field is the signed distance to an outline, negative inside, or close to it. A thing has a body and perhaps details on
it: a door, an eye, spots. All bodies cover the same area, so that the area does not tell the thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A value at each point (x, y)."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """``body`` is enlarged by ``scale``, which makes its area that of the unit circle. ``details`` lie on it."""

    scale: float
    body: Field
    details: Field | None = None


def _polygon(*corners: Point) -> Field:
    """A closed polygon (even-odd rule)."""

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nearest = torch.full_like(x, math.inf)
        inside = torch.zeros_like(x, dtype=torch.bool)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            ex, ey = bx - ax, by - ay
            along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
            nearest = torch.minimum(nearest, torch.hypot(x - ax - along * ex, y - ay - along * ey))
            if ey:
                crosses = ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
                inside ^= crosses
        return torch.where(inside, -nearest, nearest)

    return distance


def _box(left: float, top: float, right: float, bottom: float) -> Field:
    return _polygon((left, top), (right, top), (right, bottom), (left, bottom))


def _disc(x0: float, y0: float, radius: float, flatness: float = 1.0) -> Field:
    """A disc, or an ellipse whose height is ``flatness`` of its width."""
    return lambda x, y: flatness * (torch.hypot(x - x0, (y - y0) / flatness) - radius)


def _all_of(*fields: Field) -> Field:
    """What lies in one of them at least."""

    def nearest(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = fields[0](x, y)
        for field in fields[1:]:
            out = torch.minimum(out, field(x, y))
        return out

    return nearest


def _without(field: Field, other: Field) -> Field:
    """What lies in the first and not in the other."""
    return lambda x, y: torch.maximum(field(x, y), -other(x, y))


def _turned(count: int, radius: float, size: float) -> Field:
    """``count`` discs of ``size`` in a circle of ``radius``."""
    turns = [2 * math.pi * n / count for n in range(count)]
    return _all_of(*(_disc(radius * math.sin(turn), -radius * math.cos(turn), size) for turn in turns))


def _star(points: int, inner: float) -> Field:
    turns = [math.pi * (i / points - 0.5) for i in range(2 * points)]
    return _polygon(*((r * math.cos(a), r * math.sin(a)) for a, r in zip(turns, [1.0, inner] * points, strict=True)))


_CROWN = _all_of(_disc(0, -0.35, 0.62), _disc(-0.42, 0.05, 0.42), _disc(0.42, 0.05, 0.42))
_CAP = _without(_disc(0, 0.1, 1.0, 0.85), _box(-2, 0.1, 2, 2))

THINGS: dict[str, Thing] = {
    "star": Thing(1.541, _star(5, 0.45)),
    "moon": Thing(1.418, _without(_disc(0.3, 0, 1.0), _disc(0.9, 0, 0.85))),
    "heart": Thing(1.204, _all_of(
        _disc(-0.46, -0.32, 0.5), _disc(0.46, -0.32, 0.5),
        _polygon((-0.86, -0.02), (0, -0.4), (0.86, -0.02), (0.0, 0.95)),
    )),
    "circle": Thing(1.0, _disc(0, 0, 1.0)),
    "house": Thing(1.122, _all_of(
        _box(-0.75, -0.15, 0.75, 0.95), _polygon((0, -1.0), (1.0, -0.15), (-1.0, -0.15)),
    ), _all_of(_box(-0.2, 0.35, 0.2, 0.95), _disc(0, -0.45, 0.17))),
    "tree": Thing(1.25, _all_of(_CROWN, _box(-0.17, 0.2, 0.17, 1.0)), _without(_box(-0.17, 0.2, 0.17, 1.0), _CROWN)),
    "fish": Thing(1.42, _all_of(
        _disc(0.15, 0, 0.85, 0.6), _polygon((-0.5, 0), (-1.1, -0.5), (-0.95, 0), (-1.1, 0.5)),
    ), _all_of(_disc(0.55, -0.1, 0.13), _box(0.08, -0.22, 0.18, 0.22))),
    "mushroom": Thing(1.283, _all_of(_CAP, _box(-0.34, 0.05, 0.34, 0.95)), _all_of(
        _disc(-0.5, -0.2, 0.17), _disc(0.08, -0.42, 0.2), _disc(0.56, -0.14, 0.15),
    )),
    "flower": Thing(1.103, _turned(6, 0.6, 0.4), _disc(0, 0, 0.32)),
    "boat": Thing(1.347, _all_of(
        _polygon((-1.0, 0.3), (1.0, 0.3), (0.62, 0.85), (-0.62, 0.85)),
        _polygon((0.0, -0.95), (0.0, 0.35), (-0.8, 0.15)), _polygon((0.12, -0.7), (0.75, 0.15), (0.12, 0.35)),
    ), _box(-0.9, 0.42, 0.9, 0.56)),
    "ring": Thing(1.155, _without(_disc(0, 0, 1.0), _disc(0, 0, 0.5))),
    "square": Thing(0.887, lambda x, y: torch.maximum(x.abs(), y.abs()) - 1),
}  # fmt: skip
