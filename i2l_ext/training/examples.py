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
    that the base generated without a LoRA, from the captions of the rows ``own_caption`` [M]. ``patches`` [N, L, D] and
    ``grey`` [1, L, D]: SigLIP2's patch tokens, and those of a grey picture. ``content`` [N]: a number for what each
    picture shows; None: each shows something else.
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
    patches: torch.Tensor | None = None
    grey: torch.Tensor | None = None
    content: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def sample_same_style(self, rows: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """For each of ``rows`` [B] the row of another picture of its style, or itself where it is the only one."""
        others = self.count[rows] - 1
        hop = 1 + (torch.rand(len(rows), generator=rng) * others).long().clamp(max=(others - 1).clamp(min=0))
        return self.first[rows] + (rows - self.first[rows] + hop) % self.count[rows]

    def sample_other_contents(self, rows: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
        """For each of ``rows`` [B] the rows [B, count] of pictures of its style with another content than its own.

        They differ as long as there are as many; then they repeat. Where no picture of the style has another content,
        any other picture of it is taken.
        """
        content = torch.arange(len(self)) if self.content is None else self.content
        offsets = torch.arange(int(self.count.max()))
        there = offsets < self.count[rows, None]
        found = self.first[rows, None] + offsets * there
        fitting = there & (content[found] != content[rows, None])
        chances = torch.rand(found.shape, generator=rng) * fitting
        order = chances.argsort(dim=1, descending=True)
        picked = order.gather(1, torch.arange(count) % fitting.sum(1, keepdim=True).clamp(min=1))
        alone = self.sample_same_style(rows, rng)[:, None]
        return torch.where(fitting.any(1, keepdim=True), found.gather(1, picked), alone)

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
