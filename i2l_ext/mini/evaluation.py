"""What every trial needs: unseen pictures, LoRAs made of them by the product's own pipeline, and drawings."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from i2l_ext import images, pipeline
from i2l_ext.converters.lora import Lora, concatenate
from i2l_ext.embed import Embeddings, embed
from i2l_ext.mini import world
from i2l_ext.mini.draw import WEIGHTS, Painter, as_image
from i2l_ext.mini.shape_classifier import Judge
from i2l_ext.models import catalogue
from i2l_ext.weights.compute import NO_CALLBACKS

UNSEEN = 1_000_000
"""Seeds from here on are the report's and the samples'; training uses small ones."""

PROMPTS = tuple(f"a {shape}" for shape in world.SHAPES)
SILENT = world.caption(None)
SIDE = 256
"""Side of the pictures that are given to the pipeline, in pixels."""


@dataclass(frozen=True)
class Sample:
    """A picture that nobody has trained on: how it looks to a user, and at the size of a drawing."""

    style: world.Style
    content: world.Content
    image: Image.Image
    small: torch.Tensor

    @classmethod
    def of(cls, style: world.Style, content: world.Content) -> Sample:
        picture = world.render([style], [content], SIDE)
        return cls(style, content, as_image(picture[0]), world.shrink(picture)[0])


def unseen(count: int, of_each: int, offset: int = 0) -> list[list[Sample]]:
    """``count`` styles with ``of_each`` pictures each, all with different shapes."""
    found = []
    for number in range(count):
        rng = np.random.default_rng(UNSEEN + offset + number)
        style = world.random_style(rng)
        shapes = rng.permutation(list(world.SHAPES))[:of_each]
        found.append([Sample.of(style, world.random_content(rng, str(shape))) for shape in shapes])
    return found


class Lab:
    """The weights under test, loaded once."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or WEIGHTS
        self.painter = Painter(self.folder / "base.safetensors")
        self.judge = Judge.load(self.folder / "judge.safetensors")

    def loras(self, model_name: str, samples: Sequence[Sample]) -> list[Lora]:
        """One LoRA of each picture, by the way that `i2l make` goes."""
        model = catalogue.find(model_name)
        files = {part.id: [self.folder / Path(part.files[0]).name] for part in model.parts}
        pictures = [images.open_image(_png(sample.image), sizes=model.views) for sample in samples]
        seen = embed(pictures, model, files)
        with ExitStack() as opened:
            made = []
            for n in range(len(samples)):
                tokens = {side: values[n : n + 1] for side, values in seen.tokens.items()}
                own = Embeddings(seen.image[n : n + 1], tokens)
                parts = pipeline.decode(model, files, own, [1.0], NO_CALLBACKS, opened)
                if model.bias:
                    parts = [*parts, Lora.read(self.folder / Path(model.bias.files[0]).name)]
                lora = concatenate(parts, [1.0] * len(parts))
                made.append(Lora.of(lora.arch, {path: lora[path] for path in lora}))
        return made

    def draw(
        self, prompts: Iterable[str], lora: Lora | None = None, weight: float = 1.0, seed: int = 0
    ) -> torch.Tensor:
        """One drawing a prompt, with seeds from ``seed`` on: [N, 3, 32, 32]."""
        prompts = list(prompts)
        seeds = range(seed, seed + len(prompts))
        return self.painter.tensors(prompts, seeds, [(lora, weight)] if lora and weight else ())


def mean_of(loras: Sequence[Lora]) -> Lora:
    """Several pictures' LoRAs as `i2l make` joins them: side by side, each 1/N."""
    return concatenate(loras, [1 / len(loras)] * len(loras))


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
