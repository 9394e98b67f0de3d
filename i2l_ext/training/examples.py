"""What experts learn from, computed once and kept in a file: split training.

Encoders, text encoder and VAE are needed here and then never again; the training loop reads tensors only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from i2l_ext.converters.atomic import atomic_path
from i2l_ext.converters.files import load_file, save_file


@dataclass(frozen=True)
class Examples:
    """N pictures, those of one style together.

    ``first``, ``count`` [N]: where the picture's style starts, and how many pictures it has. ``latents``
    [N, C, H, W]; ``text`` [N, T, D] and ``mask`` [N, T]: the captions; ``silent`` and ``silent_mask`` [1, T, …]: the
    caption that says nothing. ``image`` [N, E]: SigLIP2 and DINOv3; ``tokens``: Qwen-VL's [N, L, D] by the side of
    the view. ``own`` [M, C, H, W]: pictures that the base drew by itself, with ``own_caption`` [M], the number of
    the picture whose caption it had.
    """

    first: torch.Tensor
    count: torch.Tensor
    latents: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor
    silent: torch.Tensor
    silent_mask: torch.Tensor
    image: torch.Tensor
    tokens: Mapping[int, torch.Tensor] = field(default_factory=dict)
    own: torch.Tensor | None = None
    own_caption: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def partner(self, rows: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """For each picture another one of its style, or itself where it is the only one."""
        others = self.count[rows] - 1
        hop = 1 + (torch.rand(len(rows), generator=rng) * others).long().clamp(max=(others - 1).clamp(min=0))
        return self.first[rows] + (rows - self.first[rows] + hop) % self.count[rows]

    def captions(self, rows: torch.Tensor, silent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions of ``rows``, the one that says nothing where ``silent`` [N] is true."""
        text = torch.where(silent[:, None, None], self.silent, self.text[rows])
        return text, torch.where(silent[:, None], self.silent_mask, self.mask[rows])

    def save(self, path: Path) -> None:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        tensors |= {f"tokens.{side}": value for side, value in self.tokens.items()}
        with atomic_path(path, overwrite=True) as part:
            save_file(tensors, part)

    @classmethod
    def load(cls, path: Path) -> Examples:
        tensors = load_file(path)
        names = [name for name in tensors if name.startswith("tokens.")]
        tokens = {int(name.removeprefix("tokens.")): tensors.pop(name) for name in names}
        return cls(**tensors, tokens=tokens)


def by_style(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """``first`` and ``count`` of pictures whose styles have so many pictures each."""
    sizes = torch.tensor(counts)
    return (sizes.cumsum(0) - sizes).repeat_interleave(sizes), sizes.repeat_interleave(sizes)
