"""Pictures -> embeddings, on transformers' own SigLIP, DINOv3 and Qwen2.5-VL modules.

``dims`` says how large an encoder is and needs neither torch nor transformers. ``siglip2``, ``dinov3`` and ``qwen_vl``
have the same three functions each: ``config``, ``structure`` and ``encode``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from i2l_ext.weights.compute import Callbacks, ComputeOptions


class EncoderModule(Protocol):
    """What the modules of this room have in common. ``dims`` is of the class in ``encoders.dims`` for the encoder."""

    def structure(self, dims: Any) -> Mapping[str, tuple[int, ...]]:
        """{key in the files: shape} of every weight."""

    def encode(
        self,
        paths: Sequence[Path],
        dims: Any,
        batches: Sequence[Tensor],
        options: ComputeOptions,
        callbacks: Callbacks = ...,
    ) -> list[Tensor]:
        """For each batch of N pictures one tensor [N, ...], float32 on the CPU. The weights are read once for all."""


def encoder_module(kind: str) -> EncoderModule:
    """The module that computes encoders of this kind; KeyError for another. It imports torch."""
    from i2l_ext.encoders import dinov3, qwen_vl, siglip2

    modules: dict[str, EncoderModule] = {"siglip2": siglip2, "dinov3": dinov3, "qwen-vl": qwen_vl}
    return modules[kind]
