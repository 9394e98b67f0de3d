"""Images from mini's base model, with LoRAs or without: what a WebUI does with a real base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from i2l_ext.branch import BranchAdapter, Strength
from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.lora import Lora

from .base import MiniBase

WEIGHTS = Path(__file__).with_name("weights")
SAMPLES = Path(__file__).with_name("samples")

NEGATIVE_PROMPT = "a picture"
"""What the negative branch is told unless something else is: it describes nothing."""

WeightedLoras = Sequence[tuple[Lora, float]]


class Sampler:
    """The base model, loaded once."""

    def __init__(self, weights: Path = WEIGHTS / "base.safetensors") -> None:
        self.base = MiniBase.load(weights)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], loras: WeightedLoras = ()) -> torch.Tensor:
        """An image for each prompt and seed, float32 [N, 3, 64, 64] in 0..1. It does not depend on the others.

        Raises UserError for a word that the base does not know and for a LoRA of another base model.
        """
        with self.with_fused_loras(loras) as base:
            return torch.cat(
                [base.generate(prompts[i : i + 64], seeds[i : i + 64]) for i in range(0, len(prompts), 64)]
            )

    def adapter(self, loras: Sequence[Lora]) -> BranchAdapter:
        """LoRAs beside the base, for `generate_guided`. Raises UserError for a LoRA of another base model."""
        for lora in loras:
            _check_base(lora)
        return BranchAdapter(self.base.transformer, loras)

    def generate_guided(
        self,
        adapter: BranchAdapter,
        strengths: Sequence[Strength],
        prompts: Sequence[str],
        seeds: Sequence[int],
        scale: float,
        negative_prompt: str = NEGATIVE_PROMPT,
    ) -> torch.Tensor:
        """An image for each prompt and seed as `generate`, with a negative branch whose prompt is its own, and with the
        adapter's LoRAs on the branches that their strengths say. ``scale`` (cfg) 1: no negative branch."""
        branches = [True] * len(prompts) + [False] * len(prompts) * (scale != 1)
        with adapter.active(strengths, branches):
            return self.base.generate(
                prompts, seeds, negative_prompt=None if scale == 1 else negative_prompt, scale=scale
            )

    def images(
        self, prompts: Sequence[str], seeds: Sequence[int], loras: WeightedLoras = (), size: int | None = None
    ) -> list[Image.Image]:
        """The same in RGB, 64 x 64 pixels or enlarged to ``size`` x ``size``."""
        return [as_image(pixels, size) for pixels in self.generate(prompts, seeds, loras)]

    @contextmanager
    def with_fused_loras(self, loras: WeightedLoras) -> Iterator[MiniBase]:
        """The base with the LoRAs added to its weights until the block ends, each times its LoRA weight.

        Raises UserError for a LoRA of another base model.
        """
        before: dict[str, torch.Tensor] = {}
        try:
            for lora, weight in loras:
                _check_base(lora)
                for path in lora:
                    layer = self.base.transformer.get_submodule(path)
                    before.setdefault(path, layer.weight.data)
                    layer.weight.data = layer.weight.data + weight * lora.delta(path)
            yield self.base
        finally:
            for path, original in before.items():
                self.base.transformer.get_submodule(path).weight.data = original


def _check_base(lora: Lora) -> None:
    if lora.arch is not MINI:
        raise UserError(f"This LoRA is for {lora.arch.title}; mini can use only its own.")


def as_image(pixels: torch.Tensor, size: int | None = None) -> Image.Image:
    """[3, H, W] in 0..1 as RGB, enlarged to ``size`` x ``size`` where that is given."""
    levels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(levels)
    return image.resize((size, size), Image.Resampling.LANCZOS) if size else image
