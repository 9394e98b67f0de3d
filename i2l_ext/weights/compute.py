"""Where and how to compute, and whom to tell. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from i2l_ext.converters.errors import Cancelled

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ComputeOptions:
    """``device`` and ``dtype`` by torch's names; ``dtype`` is bfloat16, float16 or float32, or, as a wish for all
    encoders of a model, also auto (devices.choose_dtype). ``memory`` limits the bytes of weights, pictures and
    activations; None: no limit on the processor, and 0.85 of what is free on another device. ``held``: bytes of the
    computer's memory that are taken for as long as encoders run."""

    device: str = "cpu"
    dtype: str = "bfloat16"
    memory: int | None = None
    held: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the device and, if it holds floats, in the dtype."""
        return tensor.to(self.device, self.torch_dtype if tensor.is_floating_point() else tensor.dtype)


@dataclass(frozen=True)
class Callbacks:
    """Who is told how far a computation is, and who may stop it.

    ``step`` gets the id of a step that begins, ``progress`` the share of it that is done, 0 to 1. ``cancelled`` says
    whether to stop, and is called many times a second. ``begin_saving`` is called when files are about to get their
    names, and may raise Cancelled. All are called on the thread that computes.
    """

    step: Callable[[str], None] = lambda id: None
    progress: Callable[[float], None] = lambda share: None
    cancelled: Callable[[], bool] = lambda: False
    begin_saving: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raises Cancelled when the user wants to stop."""
        if self.cancelled():
            raise Cancelled

    def part(self, start: float, end: float) -> Callbacks:
        """The same for a part of a step, whose progress fills ``start`` to ``end`` of the whole."""
        return replace(self, progress=lambda share: self.progress(start + share * (end - start)))


DEFAULT_OPTIONS = ComputeOptions()

NO_CALLBACKS = Callbacks()
"""Tells nobody, and never stops."""
