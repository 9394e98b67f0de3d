"""The miniature's base model: diffusers' Qwen-Image transformer at tiny dimensions, drawing 32x32 pixels directly.

Flow matching as Qwen-Image has it: x_t = (1 - t) * picture + t * noise, and drawing goes from t = 1 to t = 0 in Euler
steps. Two things are unlike Qwen-Image, because pixels come in patches nearly as wide as this transformer: it says
the picture, from which the velocity follows (Li and He 2025, arXiv 2511.13720), and each token carries the place of
its patch beside its pixels. A caption becomes one row of a fixed random table a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import load_file
from i2l_ext.training.flow import velocity

from . import world

PATCH = 4
GRID = world.PIXELS // PATCH
TOKENS = 12
TEXT_DIM = 32
CONFIG = {
    "patch_size": PATCH,
    "in_channels": 3 * PATCH**2 + 2 * GRID,
    "out_channels": 3,
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (8, 12, 12),
}
STEPS = 10
"""Euler steps of a drawing."""
SHIFT = 3.0
"""Of their times towards noise, as Qwen-Image's scheduler has it (Esser et al. 2024, section 5.3.2): t -> s t / (1 +
(s - 1) t). Chosen with seeds that the report does not use."""

VOCABULARY = ("a", "picture", "on", "outlined", *world.SHAPES, *filter(None, world.PLACES), *world.TEXTURES,
              *world.GROUNDS, *world.COLOURS)  # fmt: skip
_IGNORED = frozenset({"an", "the", "of"})


def words_of(prompt: str) -> list[str]:
    """The known words of a prompt. Raises UserError for a word that the miniature never learned."""
    words = [word for word in prompt.lower().replace(",", " ").split() if word not in _IGNORED]
    unknown = [word for word in words if word not in VOCABULARY]
    if unknown:
        shapes = ", ".join(world.SHAPES)
        raise UserError(f"the miniature does not know the word '{unknown[0]}'; try 'a SHAPE' with one of: {shapes}")
    if not words:
        raise UserError("the prompt is empty; try 'a star'")
    if len(words) > TOKENS:
        raise UserError(f"the miniature reads {TOKENS} words at most, the prompt has {len(words)}")
    return words


class Base(nn.Module):
    """The transformer and its table of words."""

    arch = MINI

    def __init__(self) -> None:
        super().__init__()
        self.transformer = QwenImageTransformer2DModel(**CONFIG)
        self.register_buffer("words", torch.randn(len(VOCABULARY), TEXT_DIM))
        ones = torch.eye(GRID)
        places = torch.cat([ones.repeat_interleave(GRID, 0), ones.repeat(GRID, 1)], dim=1)
        self.register_buffer("places", places, persistent=False)

    @classmethod
    def load(cls, path: Path) -> Base:
        """The trained base in fp32, ready to draw."""
        base = cls()
        base.load_state_dict({key: value.float() for key, value in load_file(path).items()})
        return base.eval().requires_grad_(False)

    def read(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts -> embeddings [N, 12, 32] and the mask of words [N, 12]."""
        ids = torch.zeros(len(prompts), TOKENS, dtype=torch.long)
        mask = torch.zeros(len(prompts), TOKENS, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            words = [VOCABULARY.index(word) for word in words_of(prompt)]
            ids[row, : len(words)] = torch.tensor(words)
            mask[row, : len(words)] = True
        return self.words[ids], mask

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Velocity: x [N, 3, 32, 32] in -1..1, t [N] in 0..1 -> [N, 3, 32, 32]."""
        picture = velocity(self.transformer, x, t, text, mask, PATCH, self.places)
        return (x - picture.to(x)) / t.clamp(min=1 / 20).view(-1, 1, 1, 1)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int = STEPS) -> torch.Tensor:
        """One picture a prompt and seed: float32 [N, 3, 32, 32] in 0..1. A picture does not depend on its batch."""
        side = (3, world.PIXELS, world.PIXELS)
        x = torch.stack([torch.randn(side, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        text, mask = self.read(prompts)
        even = torch.linspace(1, 0, steps + 1)
        times = SHIFT * even / (1 + (SHIFT - 1) * even)
        for now, then in pairwise(times):
            x = x + (then - now) * self(x, now.expand(len(x)), text, mask)
        return (x / 2 + 0.5).clamp(0, 1)
