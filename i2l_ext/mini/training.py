"""Mini as a base model for a training run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from i2l_ext.converters.errors import UserError
from i2l_ext.training.config import TrainingConfig
from i2l_ext.training.examples import Examples

from .base import MiniBase
from .dataset import make_examples
from .foundations import build_foundations


class MiniTraining:
    """Training for mini, from nothing; a `training.base.TrainingBase`."""

    plain_attention = True
    """For these short sequences the backward pass of PyTorch's fused attention takes six times as long on a CPU."""

    def __init__(self, config: TrainingConfig) -> None:
        """Raises UserError for a configuration without foundations, and for data of another base model."""
        if config.foundations is None:
            raise UserError("foundations: mini's base has to be trained first; add this section.")
        if config.data.kind != "world":
            raise UserError(f"data.kind: {config.data.kind!r} is not for mini; choose 'world'.")
        self.data, self.seed = config.data, config.seed
        self.foundations = build_foundations(config.foundations, config.seed)

    def load(self, folder: Path, device: torch.device) -> MiniBase:
        """The base model that was trained in ``folder``."""
        return MiniBase.load(folder / "base.safetensors").to(device)

    def examples(self, folder: Path, views: Iterable[int], patches: bool) -> Examples:
        """Pictures of the world, embedded by the encoders that were trained in ``folder``."""
        return make_examples(self.data, folder, views, patches, self.seed)
