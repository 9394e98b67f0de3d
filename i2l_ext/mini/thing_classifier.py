"""A small classifier of things, trained on the world. It tells whether an image shows what the prompt asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from i2l_ext.converters.files import load_file

from .things import THINGS


class ThingClassifier(nn.Module):
    """Images [N, 3, 64, 64] in 0..1 -> logits over the things [N, 12]."""

    def __init__(self) -> None:
        """Untrained, with random weights."""
        super().__init__()
        layers: list[nn.Module] = []
        for d_in, d_out in ((3, 16), (16, 32), (32, 48), (48, 64)):
            layers += [nn.Conv2d(d_in, d_out, 3, padding=1), nn.GroupNorm(8, d_out), nn.SiLU()]
            layers += [nn.Conv2d(d_out, d_out, 3, stride=2, padding=1), nn.GroupNorm(8, d_out), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, len(THINGS)))

    @classmethod
    def load(cls, path: Path) -> ThingClassifier:
        """The trained classifier in fp32, frozen."""
        classifier = cls()
        classifier.load_state_dict({key: value.float() for key, value in load_file(path).items()})
        return classifier.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)

    @torch.no_grad()
    def things(self, images: torch.Tensor) -> list[str]:
        """The most likely thing in each image."""
        names = list(THINGS)
        return [names[n] for n in self(images).argmax(1).tolist()]
