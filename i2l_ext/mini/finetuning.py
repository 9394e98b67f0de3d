"""LoRAs trained in the ordinary way on a few pictures of a style, several styles side by side.

The base is frozen, so K trainings are one pass over K times the batch. AdamW treats every number by itself, so each
training is what it would be alone. After every few steps the loss on held-out pictures is read: other pictures of the
style, with timesteps and noise that are always the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from i2l_ext.training.flow import add_noise, sample_timesteps, timestep_quantiles
from i2l_ext.training.heads import LoraFactors, PerSampleLora

from . import world
from .base import MiniBase
from .evaluation import UnseenPicture, unseen_pictures

BATCH = 4
EVERY = 5
"""The held-out loss is read after every so many steps."""
READINGS = 16
"""Noisy pictures to a held-out loss."""


@dataclass(frozen=True)
class StyleSet:
    """Pictures of one unseen style: ``pictures`` to train on, and ``held_out`` of the same things at other places.
    ``seed`` sets the order and the noise of a training."""

    pictures: list[UnseenPicture]
    held_out: list[UnseenPicture]
    seed: int


@dataclass
class Curves:
    """What N trainings side by side came to.

    ``losses`` [readings, N]: on the held-out pictures, the first before any step. ``factors``: step -> the LoRAs then.
    """

    losses: torch.Tensor
    factors: dict[int, LoraFactors] = field(default_factory=dict)


def style_sets(count: int, size: int, offset: int) -> list[StyleSet]:
    """``count`` styles with ``size`` pictures each to train on, of different things, and as many held out."""
    sets = []
    for number, group in enumerate(unseen_pictures(count, size, offset=offset)):
        rng = np.random.default_rng(40_000_000 + offset + number)
        others = [UnseenPicture.of(one.style, world.random_content(rng, one.content.thing)) for one in group]
        sets.append(StyleSet(group, others, offset + number))
    return sets


def train_loras(
    base: MiniBase,
    starts: LoraFactors,
    sets: Sequence[StyleSet],
    rate: float,
    steps: int,
    *,
    patience: int | None = None,
    keep: Sequence[int] = (),
) -> Curves:
    """Train a LoRA on each of N sets, from ``starts``, with AdamW at one rate.

    With ``patience`` all stop when no set has come to a lower held-out loss for so many steps. The LoRAs after the
    steps ``keep`` are in the result, 0 for the start.
    """
    factors = {path: (nn.Parameter(a.clone()), nn.Parameter(b.clone())) for path, (a, b) in starts.items()}
    optimizer = torch.optim.AdamW([p for pair in factors.values() for p in pair], lr=rate, weight_decay=0.01)
    generators = [torch.Generator().manual_seed(one.seed) for one in sets]
    encoded = [_encode_pictures(base, one.pictures) for one in sets]
    hooks = PerSampleLora(base.transformer, factors)
    hooks.factors = dict(factors)
    held_out = _HeldOut(base, sets)
    losses, found = [held_out(base)], Curves(torch.empty(0))
    try:
        for step in range(steps + 1):
            if step in keep:
                now = {path: (a.detach().clone(), b.detach().clone()) for path, (a, b) in factors.items()}
                found.factors[step] = now
            if step and step % EVERY == 0:
                losses.append(held_out(base))
                if patience and (len(losses) - 1 - torch.stack(losses).argmin(0)).min() * EVERY >= patience:
                    break
            if step == steps:
                break
            parts = [_draw(*own, rng) for own, rng in zip(encoded, generators, strict=True)]
            x_t, velocity, t, text, mask = (torch.cat(part) for part in zip(*parts, strict=True))
            _loss_by_set(base(x_t, t, text, mask), velocity, len(sets)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        hooks.remove()
    found.losses = torch.stack(losses)
    return found


def _draw(x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """One set's share of a step: noisy pictures, velocities, timesteps, text and mask."""
    chosen = torch.randint(len(x), (BATCH,), generator=rng)
    t = sample_timesteps(BATCH, rng)
    x_t, velocity = add_noise(x[chosen], t, torch.randn(BATCH, *x.shape[1:], generator=rng))
    return x_t, velocity, t, text[chosen], mask[chosen]


def _loss_by_set(predicted: torch.Tensor, velocity: torch.Tensor, count: int) -> torch.Tensor:
    """The mean squared error [count] of each set's equal share of the batch."""
    return (predicted - velocity).square().view(count, -1).mean(1)


class _HeldOut:
    """The loss on each set's held-out pictures, with fixed noise and timesteps spread as those of a training are."""

    def __init__(self, base: MiniBase, sets: Sequence[StyleSet]) -> None:
        self.count = len(sets)
        parts = []
        for one in sets:
            x, text, mask = _encode_pictures(base, one.held_out)
            rows = torch.arange(READINGS) % len(x)
            noise = torch.randn(READINGS, *x.shape[1:], generator=torch.Generator().manual_seed(7))
            t = timestep_quantiles(READINGS)
            parts.append((*add_noise(x[rows], t, noise), t, text[rows], mask[rows]))
        self.x_t, self.velocity, self.t, self.text, self.mask = (torch.cat(part) for part in zip(*parts, strict=True))

    @torch.no_grad()
    def __call__(self, base: MiniBase) -> torch.Tensor:
        predicted = base(self.x_t, self.t, self.text, self.mask)
        return _loss_by_set(predicted, self.velocity, self.count).nan_to_num(nan=float("inf"))


def _encode_pictures(
    base: MiniBase, pictures: Sequence[UnseenPicture]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, and text and mask of captions that name the content."""
    text, mask = base.encode_prompts([world.caption(picture.content) for picture in pictures])
    return base.encode_pictures(torch.stack([picture.pixels for picture in pictures])), text, mask
