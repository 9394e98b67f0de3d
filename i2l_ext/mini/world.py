"""The world of mini: every picture is a content (what) in a style (how), both from a seed.

A content is one of eight shapes near the middle. All shapes cover the same area, so that the area does not tell the
shape. A style is a palette of five colours, a texture for the shape, a kind of ground, and an outline or none.
Captions name the content. They name the style only on request, because a LoRA has to add a style to a caption that
names none.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

PIXELS = 32
"""Side of the images that the base model generates."""

Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A value at each point (x, y)."""
Colour = tuple[float, float, float]


def _polygon(*corners: tuple[float, float]) -> Field:
    """Signed distance to a closed polygon, negative inside (even-odd rule)."""

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


def _star(points: int, inner: float) -> Field:
    turns = [math.pi * (i / points - 0.5) for i in range(2 * points)]
    return _polygon(*((r * math.cos(a), r * math.sin(a)) for a, r in zip(turns, [1.0, inner] * points, strict=True)))


def _moon(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.maximum(torch.hypot(x - 0.3, y) - 1, 0.85 - torch.hypot(x - 0.9, y))


# Signed distance to each shape, and the scale at which its area is pi, that of the unit circle.
SHAPES: dict[str, tuple[float, Field]] = {
    "circle": (1.0, lambda x, y: torch.hypot(x, y) - 1),
    "square": (0.887, lambda x, y: torch.maximum(x.abs(), y.abs()) - 1),
    "triangle": (1.348, _polygon((0.0, -1.1), (1.0, 0.632), (-1.0, 0.632))),
    "star": (1.543, _star(5, 0.45)),
    "cross": (1.11, _polygon(
        (-0.4, -1.0), (0.4, -1.0), (0.4, -0.4), (1.0, -0.4), (1.0, 0.4), (0.4, 0.4),
        (0.4, 1.0), (-0.4, 1.0), (-0.4, 0.4), (-1.0, 0.4), (-1.0, -0.4), (-0.4, -0.4),
    )),
    "ring": (1.155, lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.25),
    "moon": (1.419, _moon),
    "arrow": (1.255, _polygon(
        (1.1, 0.0), (0.0, -1.0), (0.0, -0.45), (-1.0, -0.45), (-1.0, 0.45), (0.0, 0.45), (0.0, 1.0),
    )),
}  # fmt: skip

_PERIOD = 4 / PIXELS
"""Period of the textures. It equals a patch of the base, so that a texture is the same in every patch."""


def _wave(u: torch.Tensor) -> torch.Tensor:
    """1 on the second half of every period, 0 on the first, with soft edges a few percent wide."""
    return (0.5 - 8 * torch.sin(2 * math.pi * u / _PERIOD)).clamp(0, 1)


def _spots(x: torch.Tensor, y: torch.Tensor, period: float, radius: float) -> torch.Tensor:
    u, v = (x / period) % 1 - 0.5, (y / period) % 1 - 0.5
    return (0.5 + 12 * (radius - torch.hypot(u, v))).clamp(0, 1)


# The share of the second colour at each point, 0 to 1; the rest is the first colour.
TEXTURES: dict[str, Field] = {
    "flat": lambda x, y: torch.zeros_like(x),
    "striped": lambda x, y: _wave(y),
    "barred": lambda x, y: _wave(x),
    "slanted": lambda x, y: _wave(x + y),
    "dotted": lambda x, y: _spots(x, y, _PERIOD, 0.36),
    "checked": lambda x, y: (_wave(x) - _wave(y)).abs(),
}
GROUNDS: dict[str, Field] = {
    "plain": lambda x, y: torch.zeros_like(x),
    "fading": lambda x, y: y,
    "horizon": lambda x, y: (0.5 + 16 * (y - 0.6)).clamp(0, 1),
    "spotted": lambda x, y: _spots(x, y, 2 * _PERIOD, 0.27),
}
PLACES: dict[str, tuple[float, float]] = {
    "": (0.0, 0.0),
    "left": (-0.08, 0.0),
    "right": (0.08, 0.0),
    "top": (0.0, -0.08),
    "bottom": (0.0, 0.08),
}
COLOURS: dict[str, Colour] = {
    "black": (0.1, 0.1, 0.1), "grey": (0.5, 0.5, 0.5), "white": (0.95, 0.95, 0.95), "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.15), "yellow": (0.95, 0.9, 0.25), "green": (0.2, 0.7, 0.2), "teal": (0.15, 0.7, 0.7),
    "blue": (0.2, 0.3, 0.9), "purple": (0.55, 0.2, 0.75), "pink": (0.95, 0.5, 0.75), "brown": (0.45, 0.3, 0.15),
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How a picture looks. Colours are RGB in 0..1."""

    fill: Colour
    second: Colour
    ground: Colour
    horizon: Colour
    line: Colour
    texture: str
    backdrop: str
    outlined: bool

    @property
    def colours(self) -> tuple[Colour, ...]:
        """All five, in the order of the fields."""
        return (self.fill, self.second, self.ground, self.horizon, self.line)


@dataclass(frozen=True)
class Content:
    """What a picture shows: a shape of radius ``size`` around (``x``, ``y``), in units of the picture's side."""

    shape: str
    place: str
    x: float
    y: float
    size: float


NEUTRAL = Style(
    (0.30,) * 3, (0.30,) * 3, (0.88,) * 3, (0.88,) * 3, (0.30,) * 3, texture="flat", backdrop="plain", outlined=False
)
"""The style of the pictures whose captions say nothing of style: what the base generates without a LoRA."""


def _colour(rng: np.random.Generator) -> Colour:
    value = 0.25 + 0.75 * rng.random()
    return colorsys.hsv_to_rgb(rng.random(), math.sqrt(rng.random()), value)


def _distant_colour(rng: np.random.Generator, others: Sequence[Colour], least: float) -> Colour:
    """A colour at RGB distance of at least ``least`` from each of ``others``."""
    while True:
        colour = _colour(rng)
        if all(math.dist(colour, other) >= least for other in others):
            return colour


def random_style(rng: np.random.Generator) -> Style:
    """A style of random colours, far enough from each other to be told apart."""
    ground = _colour(rng)
    fill = _distant_colour(rng, [ground], 0.5)
    texture = str(rng.choice(list(TEXTURES)))
    backdrop = str(rng.choice(list(GROUNDS)))
    second = fill if texture == "flat" else _distant_colour(rng, [fill, ground], 0.35)
    horizon = ground if backdrop == "plain" else _distant_colour(rng, [fill, ground], 0.35)
    outlined = bool(rng.random() < 0.5)
    line = _distant_colour(rng, [fill, ground], 0.35) if outlined else fill
    return Style(fill, second, ground, horizon, line, texture, backdrop, outlined)


def random_content(rng: np.random.Generator, shape: str | None = None) -> Content:
    """A random shape, or the one named, at a random place."""
    shape = shape or str(rng.choice(list(SHAPES)))
    place = str(rng.choice(list(PLACES)))
    dx, dy = PLACES[place]
    jitter = rng.uniform(-0.02, 0.02, size=2)
    return Content(shape, place, 0.5 + dx + jitter[0], 0.5 + dy + jitter[1], rng.uniform(0.25, 0.27))


def colour_name(colour: Colour) -> str:
    """The name of the nearest colour in `COLOURS`."""
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], colour))


def caption(content: Content | None, style: Style | None = None) -> str:
    """``a star left``, or with a style ``a star left, dotted red white on spotted blue grey, outlined teal``.

    Without a content it is ``a picture``: the neutral prompt, which describes nothing.
    """
    words = ["a", content.shape if content else "picture"]
    if content and content.place:
        words.append(content.place)
    if style:
        words += [style.texture, colour_name(style.fill), colour_name(style.second)]
        words += ["on", style.backdrop, colour_name(style.ground), colour_name(style.horizon)]
        words += ["outlined", colour_name(style.line)] if style.outlined else []
    return " ".join(words)


def render(styles: Sequence[Style], contents: Sequence[Content], side: int = 4 * PIXELS) -> torch.Tensor:
    """The n-th content in the n-th style: float32 [N, 3, side, side], RGB in 0..1."""
    count = len(styles)
    steps = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    y, x = (grid.expand(count, side, side) for grid in torch.meshgrid(steps, steps, indexing="ij"))
    palette = torch.tensor([style.colours for style in styles], dtype=torch.float32)[..., None, None]
    fill, second, ground, horizon, line = palette.unbind(1)

    where = torch.tensor([(c.x, c.y, c.size) for c in contents], dtype=torch.float32)[:, :, None, None]
    size = where[:, 2] * torch.tensor([SHAPES[c.shape][0] for c in contents])[:, None, None]
    u, v = (x - where[:, 0]) / size, (y - where[:, 1]) / size
    shapes = {name: field for name, (_, field) in SHAPES.items()}
    distance = size * _evaluate_named([c.shape for c in contents], shapes, u, v)
    body = (0.5 - distance * side).clamp(0, 1)[:, None]
    outlined = torch.tensor([style.outlined for style in styles])[:, None, None]
    stroke = ((0.5 - (distance.abs() - 0.03) * side).clamp(0, 1) * outlined)[:, None]

    inside = torch.lerp(fill, second, _evaluate_named([s.texture for s in styles], TEXTURES, x, y)[:, None])
    outside = torch.lerp(ground, horizon, _evaluate_named([s.backdrop for s in styles], GROUNDS, x, y)[:, None])
    return torch.lerp(torch.lerp(outside, inside, body), line, stroke)


def _evaluate_named(names: Sequence[str], table: dict[str, Field], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[N, H, W]: for each picture the field of its name, at points x and y [N, H, W]."""
    out = torch.empty_like(x)
    for name, field in table.items():
        rows = torch.tensor([i for i, n in enumerate(names) if n == name], dtype=torch.long)
        if len(rows):
            out[rows] = field(x[rows], y[rows])
    return out


def downscale(pictures: torch.Tensor, side: int = PIXELS) -> torch.Tensor:
    """Means over squares of pixels: [N, 3, S, S] -> [N, 3, side, side]."""
    return torch.nn.functional.adaptive_avg_pool2d(pictures, side)
