"""The world of mini: every picture is a content (what) in a style (how), both from a seed.

A content is one of twelve things at one of five places, or two things side by side. A style is a palette of five
colours, a texture, a ground, an outline or none, and light or none. Captions name the content. They name the style only
on request, because a LoRA has to add a style to a caption that names none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .looks import GROUNDS, OUTLINES, TEXTURES, Style, colour_name
from .things import THINGS, Field

PIXELS = 64
"""Side of the images that the base model generates."""

PLACES: dict[str, tuple[float, float]] = {
    "": (0.5, 0.5), "left": (0.38, 0.5), "right": (0.62, 0.5), "top": (0.5, 0.38), "bottom": (0.5, 0.62),
}  # fmt: skip
"""Where a thing that is alone stands, in sides of the picture. Places are fixed: a base as small as this one wavers
between places that are close to each other."""
SIZE = 0.27
"""Radius of a circle that is alone, in sides of the picture."""
PAIR = ((0.27, 0.5, 0.16), (0.73, 0.5, 0.16))
"""Places and radii of two things side by side."""
PAIRS = 0.25
"""Share of the pictures that show two things."""

_SHADE, _GLEAM, _SHADOW = 0.4, 0.45, 0.35
"""How far light and shadow go towards black or white."""


@dataclass(frozen=True)
class Figure:
    """A thing of radius ``size`` around (``x``, ``y``), in sides of the picture."""

    thing: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Content:
    """What a picture shows: a thing at a place of `PLACES`, or two side by side, the ``other`` on the right."""

    thing: str
    place: str = ""
    other: str = ""

    @property
    def figures(self) -> tuple[Figure, ...]:
        if self.other:
            return tuple(Figure(thing, *where) for thing, where in zip((self.thing, self.other), PAIR, strict=True))
        return (Figure(self.thing, *PLACES[self.place], SIZE),)


def random_content(rng: np.random.Generator, thing: str | None = None) -> Content:
    """The thing named at a random place; or a random content, in which there may be two things."""
    if thing is None and rng.random() < PAIRS:
        first, other = rng.choice(list(THINGS), 2, replace=False)
        return Content(str(first), other=str(other))
    return Content(thing or str(rng.choice(list(THINGS))), str(rng.choice(list(PLACES))))


def caption(content: Content | None, style: Style | None = None) -> str:
    """``a star left``, ``a star and a moon``, or with a style ``a star, dotted red white on spotted blue grey, outlined
    teal lit``.

    Without a content it is ``a picture``: the neutral prompt, which describes nothing.
    """
    words = ["a", content.thing if content else "picture"]
    if content and content.place:
        words.append(content.place)
    if content and content.other:
        words += ["and", "a", content.other]
    if style:
        words += [style.texture, colour_name(style.fill), colour_name(style.second)]
        words += ["on", style.backdrop, colour_name(style.ground), colour_name(style.horizon)]
        words += [style.outline, colour_name(style.line), *["lit"] * style.lit]
    return " ".join(words)


def render(styles: Sequence[Style], contents: Sequence[Content], side: int = 4 * PIXELS) -> torch.Tensor:
    """The n-th content in the n-th style: float32 [N, 3, side, side], RGB in 0..1, with smooth edges."""
    count = len(styles)
    steps = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    y, x = (grid.expand(count, side, side) for grid in torch.meshgrid(steps, steps, indexing="ij"))
    palette = torch.tensor([style.colours for style in styles], dtype=torch.float32)[..., None, None]
    fill, second, ground, horizon, line = palette.unbind(1)
    lit = torch.tensor([style.lit for style in styles])[:, None, None]
    width = torch.tensor([OUTLINES[style.outline] for style in styles])[:, None, None]

    drawn = _Drawing.of(contents, x, y)
    cast = _Drawing.of(contents, x - 0.045, y - 0.055)
    body, details = (_covered(field, side) for field in (drawn.body, drawn.details))
    stroke = _covered(drawn.body.abs() - width, side) * (width > 0)[:, None]
    shadow = _SHADOW * _covered(cast.body, side) * lit[:, None]

    inside = torch.lerp(fill, second, _evaluate_named([s.texture for s in styles], TEXTURES, x, y)[:, None])
    inside = torch.lerp(inside, line, details)
    dark, bright = _SHADE * drawn.slope.clamp(0, 1) * lit, _GLEAM * (-drawn.slope).clamp(0, 1) * lit
    inside = inside * (1 - dark[:, None]) + (1 - inside) * bright[:, None]
    outside = torch.lerp(ground, horizon, _evaluate_named([s.backdrop for s in styles], GROUNDS, x, y)[:, None])
    return torch.lerp(torch.lerp(outside * (1 - shadow), inside, body), line, stroke)


@dataclass(frozen=True)
class _Drawing:
    """Fields [N, H, W], in sides of the picture, of the figures of N contents: distance to the ``body`` of the nearest
    one and to its ``details``, and its ``slope``, -1 where light falls on it, 1 where none does."""

    body: torch.Tensor
    details: torch.Tensor
    slope: torch.Tensor

    @classmethod
    def of(cls, contents: Sequence[Content], x: torch.Tensor, y: torch.Tensor) -> _Drawing:
        body, details, slope = torch.full_like(x, 9.0), torch.full_like(x, 9.0), torch.zeros_like(x)
        for number in range(2):
            for name, thing in THINGS.items():
                found = [(row, c.figures[number]) for row, c in enumerate(contents) if len(c.figures) > number]
                found = [(row, figure) for row, figure in found if figure.thing == name]
                if not found:
                    continue
                rows = torch.tensor([row for row, _ in found])
                where = torch.tensor([(f.x, f.y, f.size * thing.scale) for _, f in found])[:, :, None, None]
                x0, y0, size = where.unbind(1)
                u, v = (x[rows] - x0) / size, (y[rows] - y0) / size
                own = size * thing.body(u, v)
                nearer = own < body[rows]
                slope[rows] = torch.where(nearer, 0.75 * (u + v), slope[rows])
                body[rows] = torch.minimum(own, body[rows])
                if thing.details is not None:
                    details[rows] = torch.minimum(size * thing.details(u, v), details[rows])
        return cls(body, details, slope)


def _covered(distance: torch.Tensor, side: int) -> torch.Tensor:
    """How much of each pixel lies inside, [N, 1, H, W]; distances [N, H, W] are in sides of the picture."""
    return (0.5 - distance * side).clamp(0, 1)[:, None]


def _evaluate_named(names: Sequence[str], table: Mapping[str, Field], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
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
