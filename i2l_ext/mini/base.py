"""The base model of mini: diffusers' Qwen-Image transformer at tiny dimensions, and an autoencoder around it, for
images of 64 x 64 pixels.

Flow matching is that of Qwen-Image, in latents: x_t = (1 - t) * image + t * noise, and generating goes from t = 1 to
t = 0 in Euler steps. Two things differ, because a patch of latents is nearly as wide as this transformer. It predicts
the image, from which the velocity follows (Li and He 2025, arXiv 2511.13720). And each token carries the position of
its patch beside the latents. Each word of a caption becomes a row of a fixed random table.
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
from .autoencoder import CHANNELS, FACTOR, Autoencoder
from .prompts import MAX_WORDS, VOCABULARY, tokenize

PATCH = 2
SIDE = world.PIXELS // FACTOR
"""Latents along the side of an image."""
GRID = SIDE // PATCH
TEXT_DIM = 64
TRANSFORMER_CONFIG = {
    "patch_size": PATCH,
    "in_channels": CHANNELS * PATCH**2 + 2 * GRID,
    "out_channels": CHANNELS,
    "num_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (8, 12, 12),
}
STEPS = 10
"""Euler steps for an image."""
SHIFT = 3.0
"""Shift of their timesteps towards noise, as in Qwen-Image's scheduler (Esser et al. 2024, section 5.3.2): t -> s t /
(1 + (s - 1) t). Chosen with seeds that the report does not use."""


class MiniBase(nn.Module):
    """The autoencoder, the transformer and its word embeddings; a `training.base.FrozenBase`."""

    arch = MINI

    def __init__(self) -> None:
        """Untrained, with random weights."""
        super().__init__()
        self.autoencoder = Autoencoder().requires_grad_(False)
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

    @torch.no_grad()
    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, 64, 64] in 0..1 -> latents, float32 [N, 12, 16, 16]."""
        return torch.cat([self.autoencoder.encode(part.float()) for part in pictures.split(256)])

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings, float32 [N, 16, 64], and a mask, bool [N, 16], of N prompts. Raises UserError for an unknown
        word."""
        ids = torch.zeros(len(prompts), MAX_WORDS, dtype=torch.long)
        mask = torch.zeros(len(prompts), MAX_WORDS, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            words = [VOCABULARY.index(word) for word in tokenize(prompt)]
            ids[row, : len(words)] = torch.tensor(words)
            mask[row, : len(words)] = True
        return self.words[ids], mask

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Velocity [N, 12, 16, 16] of noisy latents x [N, 12, 16, 16], at timesteps t [N] in 0..1."""
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
        """An image for each of N prompts and seeds, float32 [N, 3, 64, 64] in 0..1. It does not depend on the others.

        Arguments as of `generate_latents`.
        """
        latents = self.generate_latents(prompts, seeds, steps, negative_prompt=negative_prompt, scale=scale)
        return self.autoencoder.decode(latents).clamp(0, 1)

    @torch.no_grad()
    def generate_latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = STEPS,
        *,
        negative_prompt: str | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """The same before it is decoded, float32 [N, 12, 16, 16].

        With a ``negative_prompt`` each step predicts twice, in one batch of 2 N: first the N rows of the positive
        branch, then those of the negative one. ``scale``: of guidance (cfg).
        """
        shape = (CHANNELS, SIDE, SIDE)
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
        return x
