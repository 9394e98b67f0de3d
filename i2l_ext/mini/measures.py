"""What the report measures, written before anything was tuned on it.

Pictures are float32 [N, 3, 32, 32] in 0..1. The distance of two styles has two halves, each scaled so that two
unrelated styles of the world are 1 apart on average:

* colour: the sliced Wasserstein-1 distance of the pixels as points in RGB, over 16 fixed directions (Bonneel et
  al. 2015, "Sliced and Radon Wasserstein barycenters of measures"). It sees palettes, not places.
* texture: the Wasserstein-1 distance of the absolute differences between pixels one and three apart, along rows,
  columns and both diagonals: how often, how strongly and in which direction the colour changes.

Neither is zero for two pictures of one style with different contents; `report` states that floor beside the
figures.
"""

from __future__ import annotations

import math

import torch

_COLOUR_UNIT = 0.2186
_TEXTURE_UNIT = 0.0620
"""Mean raw distances between unrelated styles: `unit_distances()` recomputes them."""

_SHIFTS = tuple((dy * lag, dx * lag) for lag in (1, 3) for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)))


def _directions() -> torch.Tensor:
    """16 directions spread over a half-sphere by the golden angle: [3, 16]."""
    i = torch.arange(16) + 0.5
    z, turn = i / 16, i * math.pi * (3 - math.sqrt(5))
    r = (1 - z * z).sqrt()
    return torch.stack([r * turn.cos(), r * turn.sin(), z])


def _colours(pictures: torch.Tensor) -> torch.Tensor:
    """Sorted projections of all pixels: [N, 16, pixels]."""
    points = pictures.flatten(2).transpose(1, 2) @ _directions()
    return points.transpose(1, 2).sort(-1).values


def _textures(pictures: torch.Tensor) -> torch.Tensor:
    """Sorted absolute differences a shift, all channels: [N, 8, 3, 29 * 29]."""
    side = pictures.shape[-1]
    middle = pictures[..., : side - 3, 3 : side - 3]
    out = []
    for dy, dx in _SHIFTS:
        moved = pictures[..., dy : dy + middle.shape[-2], 3 + dx : 3 + dx + middle.shape[-1]]
        out.append((moved - middle).abs().flatten(2).sort(-1).values)
    return torch.stack(out, dim=1)


def colour_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[N, 3, 32, 32] twice -> [N]."""
    return (_colours(a) - _colours(b)).abs().mean((1, 2)) / _COLOUR_UNIT


def texture_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[N, 3, 32, 32] twice -> [N]."""
    return (_textures(a) - _textures(b)).abs().mean((1, 2, 3)) / _TEXTURE_UNIT


def style_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean of the colour and the texture distance: [N, 3, 32, 32] twice -> [N]."""
    return (colour_distance(a, b) + texture_distance(a, b)) / 2


def set_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far two sets of pictures are apart as a whole: the same two halves, with the pixels (and differences) of
    up to 256 pictures of each set taken as those of one large picture. [N, 3, 32, 32] and [M, 3, 32, 32]; the sets
    are cut to the same size."""
    count = min(len(a), len(b), 256)
    pooled = [_pooled(part[torch.linspace(0, len(part) - 1, count).long()]) for part in (a, b)]
    colour = (_colours(pooled[0][0]) - _colours(pooled[1][0])).abs().mean() / _COLOUR_UNIT
    texture = (pooled[0][1] - pooled[1][1]).abs().mean() / _TEXTURE_UNIT
    return ((colour + texture) / 2).item()


def _pooled(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A set as one wide picture, and the sorted differences of all its pictures: [8, 3, all]."""
    return torch.cat(list(pictures), dim=2)[None], _textures(pictures).permute(1, 2, 0, 3).flatten(2).sort(-1).values
