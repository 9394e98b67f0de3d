"""The measures of the report. They were written before anything was tuned on them.

Images are float32 [N, 3, 64, 64] in 0..1. The distance of two styles has two halves. Each is scaled so that two
unrelated styles of the world are 1 apart on average:

* colour: the sliced Wasserstein-1 distance of the pixels as points in RGB, over 16 fixed directions (Bonneel et
  al. 2015, "Sliced and Radon Wasserstein barycenters of measures"). It depends on the palette, not on places.
* texture: the Wasserstein-1 distance of the absolute differences between pixels one and four apart, along rows,
  columns and both diagonals: how often, how strongly and in which direction the colour changes.

Two pictures of one style with different contents are not at distance 0. The report gives their distance too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_COLOUR_UNIT = 0.2108
_TEXTURE_UNIT = 0.0572
"""Mean distances between unrelated styles before scaling; tests/test_mini.py checks that they are 1 after it."""

_FAR = 4
_SHIFTS = tuple((dy * lag, dx * lag) for lag in (1, _FAR) for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)))


def _directions() -> torch.Tensor:
    """16 directions [3, 16] on a half-sphere, spread by the golden angle."""
    i = torch.arange(16) + 0.5
    z, turn = i / 16, i * math.pi * (3 - math.sqrt(5))
    r = (1 - z * z).sqrt()
    return torch.stack([r * turn.cos(), r * turn.sin(), z])


def _colours(images: torch.Tensor) -> torch.Tensor:
    """Sorted projections of all pixels: [N, 16, pixels]."""
    points = images.flatten(2).transpose(1, 2) @ _directions()
    return points.transpose(1, 2).sort(-1).values


def _textures(images: torch.Tensor) -> torch.Tensor:
    """Sorted absolute differences for each shift and channel: [N, 8, 3, pixels]."""
    side = images.shape[-1]
    middle = images[..., : side - _FAR, _FAR : side - _FAR]
    out = []
    for dy, dx in _SHIFTS:
        moved = images[..., dy : dy + middle.shape[-2], _FAR + dx : _FAR + dx + middle.shape[-1]]
        out.append((moved - middle).abs().flatten(2).sort(-1).values)
    return torch.stack(out, dim=1)


def colour_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The colour half: images [N, 3, 64, 64] twice -> [N]."""
    return (_colours(a) - _colours(b)).abs().mean((1, 2)) / _COLOUR_UNIT


def texture_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The texture half: images [N, 3, 64, 64] twice -> [N]."""
    return (_textures(a) - _textures(b)).abs().mean((1, 2, 3)) / _TEXTURE_UNIT


def style_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The mean of both halves: images [N, 3, 64, 64] twice -> [N]."""
    return (colour_distance(a, b) + texture_distance(a, b)) / 2


def set_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The distance of two sets of images [N, 3, 64, 64] and [M, 3, 64, 64]: the same two halves, where up to 256
    images of each set count as one large image. The larger set is cut to the size of the smaller one."""
    count = min(len(a), len(b), 256)
    pooled = [_pooled(part[torch.linspace(0, len(part) - 1, count).long()]) for part in (a, b)]
    colour = (_colours(pooled[0][0]) - _colours(pooled[1][0])).abs().mean() / _COLOUR_UNIT
    texture = (pooled[0][1] - pooled[1][1]).abs().mean() / _TEXTURE_UNIT
    return ((colour + texture) / 2).item()


def _pooled(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A set as one wide image [1, 3, 32, N * 64], and the sorted differences of all its images [8, 3, all]."""
    return torch.cat(list(images), dim=2)[None], _textures(images).permute(1, 2, 0, 3).flatten(2).sort(-1).values


def details(images: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, 64, 64] without their means over squares of eight pixels: [N, 3, 64, 64]."""
    coarse = torch.nn.functional.avg_pool2d(images, 8)
    return images - torch.nn.functional.interpolate(coarse, scale_factor=8.0, mode="bilinear")


def edge_contrast(images: torch.Tensor) -> torch.Tensor:
    """How steep the edges of images [N, 3, 64, 64] are: the mean squared difference of neighbouring pixels [N]."""
    rows, columns = (images.diff(dim=dim).square().mean((1, 2, 3)) for dim in (2, 3))
    return rows + columns


def mean_distances(
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], images: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The mean distance [N] of each group of images [N, P, 3, 64, 64] to its target [N, 3, 64, 64]."""
    count = images.shape[1]
    return measure(images.flatten(0, 1), targets.repeat_interleave(count, 0)).view(-1, count).mean(1)
