"""The base model of mini: diffusers' Qwen-Image transformer at tiny dimensions, for images of 32 x 32 pixels.

Flow matching is that of Qwen-Image: x_t = (1 - t) * image + t * noise, and generating goes from t = 1 to t = 0 in
Euler steps. Two things differ, because there is no VAE and a patch of pixels is nearly as wide as this transformer.
It predicts the image, from which the velocity follows (Li and He 2025, arXiv 2511.13720). And each token carries the
position of its patch beside the pixels. Each word of a caption becomes a row of a fixed random table.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.files import load_file
from i2l_ext.training.flow import run_transformer

from . import world
from .prompts import MAX_WORDS, VOCABULARY, tokenize

PATCH = 4
GRID = world.PIXELS // PATCH
TEXT_DIM = 32
TRANSFORMER_CONFIG = {
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
"""Euler steps for an image."""
SHIFT = 3.0
"""Shift of their timesteps towards noise, as in Qwen-Image's scheduler (Esser et al. 2024, section 5.3.2): t -> s t /
(1 + (s - 1) t). Chosen with seeds that the report does not use."""


class MiniBase(nn.Module):
    """The transformer and its word embeddings; a `training.base.FrozenBase`."""

    arch = MINI

    def __init__(self) -> None:
        """Untrained, with random weights."""
        super().__init__()
        self.transformer = QwenImageTransformer2DModel(**TRANSFORMER_CONFIG)
        self.register_buffer("words", torch.randn(len(VOCABULARY), TEXT_DIM))
        ones = torch.eye(GRID)
        positions = torch.cat([ones.repeat_interleave(GRID, 0), ones.repeat(GRID, 1)], dim=1)
        self.register_buffer("positions", positions, persistent=False)

    @classmethod
    def load(cls, path: Path) -> MiniBase:
        """The trained base in fp32, frozen."""
        base = cls()
        base.load_state_dict({key: value.float() for key, value in load_file(path).items()})
        return base.eval().requires_grad_(False)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings, float32 [N, 12, 32], and a mask, bool [N, 12], of N prompts. Raises UserError for an unknown
        word."""
        ids = torch.zeros(len(prompts), MAX_WORDS, dtype=torch.long)
        mask = torch.zeros(len(prompts), MAX_WORDS, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            words = [VOCABULARY.index(word) for word in tokenize(prompt)]
            ids[row, : len(words)] = torch.tensor(words)
            mask[row, : len(words)] = True
        return self.words[ids], mask

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Velocity [N, 3, 32, 32] of noisy pixels x [N, 3, 32, 32] in -1..1, at timesteps t [N] in 0..1."""
        image = run_transformer(self.transformer, x, t, text, mask, PATCH, self.positions)
        return (x - image.to(x)) / t.clamp(min=1 / 20).view(-1, 1, 1, 1)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = STEPS,
        *,
        negative_prompt: str | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """An image for each of N prompts and seeds, float32 [N, 3, 32, 32] in 0..1. It does not depend on the others.

        With a ``negative_prompt`` each step predicts twice, in one batch of 2 N: first the N rows of the positive
        branch, then those of the negative one. ``scale``: of guidance (cfg).
        """
        shape = (3, world.PIXELS, world.PIXELS)
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        guided = negative_prompt is not None
        text, mask = self.encode_prompts([*prompts, *[negative_prompt or ""] * len(prompts)] if guided else prompts)
        even = torch.linspace(1, 0, steps + 1)
        timesteps = SHIFT * even / (1 + (SHIFT - 1) * even)
        for now, then in pairwise(timesteps):
            velocity = self(torch.cat([x, x]) if guided else x, now.expand(len(text)), text, mask)
            if guided:
                positive, negative = velocity.chunk(2)
                velocity = negative + scale * (positive - negative)
            x = x + (then - now) * velocity
        return (x / 2 + 0.5).clamp(0, 1)
