"""Copies to a CUDA device while it computes: on a stream of their own, from pinned memory.

What is ordered against what, and by which event, is all here; tests/test_card.py replaces torch's streams and events.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor


class CopyStream:
    """The copies to one device, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def empty(self, nbytes: int) -> Tensor:
        """Uninitialised bytes on the device, to copy to."""
        with torch.cuda.stream(self.stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """Begin to copy, (target, source) each; what is to wait for the end of it. Until then no source may change."""
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                _copy(target, source)
            return self.stream.record_event()

    def compute_after(self, copied: Iterable[torch.cuda.Event]) -> None:
        """What this thread has the device compute from now on waits for these copies, and for no later ones."""
        for event in copied:
            torch.cuda.current_stream(self.device).wait_event(event)

    def copy_after_computing(self) -> None:
        """Later copies wait for what this thread has had the device compute so far. The thread itself does not."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))


def copy_stream(device: torch.device) -> CopyStream:
    """The one stream for copies to a device. Torch keeps freed memory for the stream that it was taken on: a new stream
    for each encoder would keep a buffer of each."""
    return _copy_stream(device if device.index is not None else torch.device("cuda", torch.cuda.current_device()))


@lru_cache
def _copy_stream(device: torch.device) -> CopyStream:
    return CopyStream(device)


def pinned_bytes(nbytes: int) -> Tensor:
    """Uninitialised bytes from which the device copies by itself. Torch takes the next power of two of the system."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _copy(target: Tensor, source: Tensor) -> None:
    """Of the same dtype without a copy in between, else with one on the device."""
    same = source.dtype == target.dtype
    target.copy_(source if same else source.to(target.device, non_blocking=True), non_blocking=True)
