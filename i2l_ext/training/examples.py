"""The training data of the experts, computed once and kept in a file (split training).

Encoders, text encoder and VAE are needed only here. The training loop reads tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from i2l_ext.converters.files import load_file

from .loop import save_tensors


@dataclass(frozen=True)
class Examples:
    """N pictures, those of one style next to each other. The fields are the keys of the file.

    ``first``, ``count`` [N]: the row where the picture's style starts, and how many pictures it has. ``latents``
    [N, C, H, W]. ``text`` [N, T, D] and ``mask`` [N, T]: the captions, encoded. ``silent`` [1, T, D] and
    ``silent_mask`` [1, T]: the neutral caption, which describes nothing. ``image`` [N, E]: embeddings of SigLIP2 and
    DINOv3. ``tokens``: by side of the view in pixels, Qwen-VL's [N, L, D]. ``own`` [M, C, H, W]: latents of images
    that the base generated without a LoRA, from the captions of the rows ``own_caption`` [M].
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

    def sample_same_style(self, rows: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """For each of ``rows`` [B] the row of another picture of its style, or itself where it is the only one."""
        others = self.count[rows] - 1
        hop = 1 + (torch.rand(len(rows), generator=rng) * others).long().clamp(max=(others - 1).clamp(min=0))
        return self.first[rows] + (rows - self.first[rows] + hop) % self.count[rows]

    def captions(self, rows: torch.Tensor, neutral: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Text [B, T, D] and mask [B, T] of ``rows`` [B]; the neutral caption where ``neutral`` [B] is true."""
        text = torch.where(neutral[:, None, None], self.silent, self.text[rows])
        return text, torch.where(neutral[:, None], self.silent_mask, self.mask[rows])

    def save(self, path: Path) -> None:
        """Write the file, replacing an older one. Raises UserError."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        save_tensors(path, tensors | {f"tokens.{side}": value for side, value in self.tokens.items()})

    @classmethod
    def load(cls, path: Path) -> Examples:
        """Read what `save` wrote."""
        tensors = load_file(path)
        names = [name for name in tensors if name.startswith("tokens.")]
        tokens = {int(name.removeprefix("tokens.")): tensors.pop(name) for name in names}
        return cls(**tensors, tokens=tokens)


def style_ranges(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """``first`` and ``count`` [N] of `Examples`, for styles with ``counts`` pictures each."""
    sizes = torch.tensor(counts)
    return (sizes.cumsum(0) - sizes).repeat_interleave(sizes), sizes.repeat_interleave(sizes)
