"""Mini's autoencoder: 64 x 64 pixels to 16 x 16 latents of 12 channels and back, as Qwen-Image has its VAE.

A transformer this small draws sharper edges in latents than in pixels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

CHANNELS, FACTOR = 12, 4
"""Numbers in a latent, and the pixels along its side."""
_WIDTH = 96


class _Block(nn.Module):
    """Two convolutions beside what they are given: [N, C, H, W] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class Autoencoder(nn.Module):
    """``encode`` and ``decode``. Latents have mean 0 and deviation 1 in each channel, over the pictures of a training;
    ``mean`` and ``std`` [12, 1, 1] are those of what the encoder gives."""

    def __init__(self) -> None:
        """Untrained, with random weights."""
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(FACTOR), nn.Conv2d(3 * FACTOR**2, _WIDTH, 3, padding=1), _Block(_WIDTH),
            nn.Conv2d(_WIDTH, CHANNELS, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, _WIDTH, 3, padding=1), _Block(_WIDTH), _Block(_WIDTH),
            nn.Conv2d(_WIDTH, 4 * _WIDTH // 2, 1), nn.PixelShuffle(2), _Block(_WIDTH // 2),
            nn.Conv2d(_WIDTH // 2, 4 * _WIDTH // 4, 1), nn.PixelShuffle(2), nn.SiLU(),
            nn.Conv2d(_WIDTH // 4, 3, 3, padding=1),
        )  # fmt: skip
        self.register_buffer("mean", torch.zeros(CHANNELS, 1, 1))
        self.register_buffer("std", torch.ones(CHANNELS, 1, 1))

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, 64, 64] in 0..1, encoded and decoded, for training. A twentieth of the ``noise``
        [N, 12, 16, 16] is added to the latents, so that small errors of the base do little harm."""
        latents = self.encoder(2 * pictures - 1)
        return self.decoder(latents + 0.05 * latents.detach().std() * noise) / 2 + 0.5

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, 64, 64] in 0..1 -> latents [N, 12, 16, 16]."""
        return (self.encoder(2 * pictures - 1) - self.mean) / self.std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [N, 12, 16, 16] -> pictures [N, 3, 64, 64], about in 0..1."""
        return self.decoder(latents * self.std + self.mean) / 2 + 0.5

    @torch.no_grad()
    def standardise(self, pictures: torch.Tensor) -> None:
        """Set ``mean`` and ``std`` from pictures [N, 3, 64, 64] in 0..1."""
        values = torch.cat([self.encoder(2 * part - 1) for part in pictures.split(256)])
        self.mean.copy_(values.mean((0, 2, 3)).view(-1, 1, 1))
        self.std.copy_(values.std((0, 2, 3)).view(-1, 1, 1))


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How far the steps between neighbouring pixels of images [N, 3, H, W] differ: the edges, a scalar."""
    return F.l1_loss(a.diff(dim=2), b.diff(dim=2)) + F.l1_loss(a.diff(dim=3), b.diff(dim=3))
