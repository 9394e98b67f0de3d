"""What a training run needs of a base model. Each base fills `TrainingBase`; the command chooses one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from i2l_ext.converters.architectures import Architecture

from .examples import Examples
from .loop import TrainingTask

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By ``precision`` of the configuration: what the base computes in, None for its own dtype."""


class FrozenBase(Protocol):
    """A base model whose weights do not change.

    Called with noisy latents x [N, C, H, W], timesteps t [N] in 0..1, captions text [N, L, D] and mask [N, L], it
    returns the velocity [N, C, H, W].
    """

    arch: Architecture
    transformer: nn.Module

    def __call__(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Foundation:
    """A part that has to be trained before there is a base model or an encoder to use.

    ``build`` makes its data and its task, with the files in the folder of those that it ``needs``; ``weights`` picks
    the tensors of the trained module that are saved, under the keys of the file; ``examples_need_it`` is whether the
    examples are computed with it.
    """

    build: Callable[[Path], TrainingTask]
    weights: Callable[[nn.Module], Mapping[str, torch.Tensor]] = nn.Module.state_dict
    examples_need_it: bool = True
    needs: tuple[str, ...] = ()


class TrainingBase(Protocol):
    """A base model as a training run uses it. Built from the configuration, it raises UserError for settings that it
    cannot work with."""

    foundations: Mapping[str, Foundation]
    """What is trained first, by name; empty for a base model that exists already."""

    plain_attention: bool
    """Whether PyTorch's unfused attention is the faster one on a CPU, forward and backward together."""

    def load(self, folder: Path, device: torch.device) -> FrozenBase:
        """The base model on ``device``. ``folder`` holds the foundations, NAME.safetensors each."""

    def examples(self, folder: Path, views: Iterable[int], patches: bool) -> Examples:
        """The data, embedded; with Qwen-VL's tokens of the ``views``, sides in pixels, and with SigLIP2's patch tokens
        if ``patches``. Raises UserError."""
