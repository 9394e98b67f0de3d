"""The styles of mini's world: palette, texture, light, outline and ground.

Fields are the share of a second colour at each point of a picture, 0 to 1; the rest is the first colour.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .things import Field

Colour = tuple[float, float, float]

_PERIOD = 1 / 8
"""Period of the textures: that of the base's patches, so that a texture is the same in every patch."""


def _wave(u: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """1 on a share of every period, 0 on the rest, with soft edges."""
    return (0.5 + 5 * (torch.cos(2 * math.pi * u / _PERIOD) - math.cos(math.pi * share))).clamp(0, 1)


def _spots(x: torch.Tensor, y: torch.Tensor, period: float, radius: float) -> torch.Tensor:
    u, v = (x / period) % 1 - 0.5, (y / period) % 1 - 0.5
    return (0.5 + 8 * (radius - torch.hypot(u, v))).clamp(0, 1)


def _grain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Waves in four directions, which look like noise and repeat with the period of the textures."""
    turn = 2 * math.pi / _PERIOD
    waves = ((1, 1), (2, -1), (1, -2), (0, 2))
    total = sum(torch.sin(turn * (a * x + b * y) + 1.7 * n) for n, (a, b) in enumerate(waves))
    return (0.5 + 0.6 * torch.as_tensor(total)).clamp(0, 1)


def _rays(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Twelve rays from the middle, where they fade into each other."""
    return (24 * torch.hypot(x, y)).clamp(max=4) * torch.sin(12 * torch.atan2(y, x))


TEXTURES: dict[str, Field] = {
    "flat": lambda x, y: torch.zeros_like(x),
    "striped": lambda x, y: _wave(y),
    "hatched": lambda x, y: _wave(x + y, 0.3),
    "crossed": lambda x, y: torch.maximum(_wave(x + y, 0.22), _wave(x - y, 0.22)),
    "dotted": lambda x, y: _spots(x, y, _PERIOD, 0.3),
    "checked": lambda x, y: (_wave(x) - _wave(y)).abs(),
    "brushed": lambda x, y: _wave(y + 0.3 * _PERIOD * torch.sin(2 * math.pi * x / (2 * _PERIOD)), 0.45),
    "grained": _grain,
    "shaded": lambda x, y: (1.6 * y - 0.3).clamp(0, 1),
}
GROUNDS: dict[str, Field] = {
    "plain": lambda x, y: torch.zeros_like(x),
    "fading": lambda x, y: y,
    "horizon": lambda x, y: (0.5 + 24 * (y - 0.6)).clamp(0, 1),
    "spotted": lambda x, y: _spots(x, y, 2 * _PERIOD, 0.27),
    "rayed": lambda x, y: (0.5 + _rays(x - 0.5, y - 0.5)).clamp(0, 1),
    "banded": lambda x, y: (0.5 + 5 * torch.cos(math.pi * x / _PERIOD)).clamp(0, 1),
}
OUTLINES: dict[str, float] = {"bare": 0.0, "outlined": 0.022, "bold": 0.04}
"""Half the width of the line around a thing, in sides of the picture."""
COLOURS: dict[str, Colour] = {
    "black": (0.1, 0.1, 0.1), "grey": (0.5, 0.5, 0.5), "white": (0.95, 0.95, 0.95), "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.15), "yellow": (0.95, 0.9, 0.25), "green": (0.2, 0.7, 0.2), "teal": (0.15, 0.7, 0.7),
    "blue": (0.2, 0.3, 0.9), "purple": (0.55, 0.2, 0.75), "pink": (0.95, 0.5, 0.75), "brown": (0.45, 0.3, 0.15),
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How a picture looks. Colours are RGB in 0..1. ``lit``: light from above on the left, and a shadow."""

    fill: Colour
    second: Colour
    ground: Colour
    horizon: Colour
    line: Colour
    texture: str
    backdrop: str
    outline: str
    lit: bool

    @property
    def colours(self) -> tuple[Colour, ...]:
        """All five, in the order of the fields."""
        return (self.fill, self.second, self.ground, self.horizon, self.line)


NEUTRAL = Style(
    (0.45,) * 3, (0.45,) * 3, (0.88,) * 3, (0.88,) * 3, (0.2,) * 3,
    texture="flat", backdrop="plain", outline="bare", lit=False,
)  # fmt: skip
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
    texture, backdrop, outline = (str(rng.choice(list(table))) for table in (TEXTURES, GROUNDS, OUTLINES))
    second = fill if texture == "flat" else _distant_colour(rng, [fill, ground], 0.35)
    horizon = ground if backdrop == "plain" else _distant_colour(rng, [fill, ground], 0.35)
    line = _distant_colour(rng, [fill, ground], 0.4)
    return Style(fill, second, ground, horizon, line, texture, backdrop, outline, bool(rng.random() < 0.4))


def colour_name(colour: Colour) -> str:
    """The name of the nearest colour in `COLOURS`."""
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], colour))
