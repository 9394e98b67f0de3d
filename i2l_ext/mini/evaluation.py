"""What every claim needs: unseen pictures, LoRAs made of them by the pipeline, and images generated with these."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from i2l_ext import images, pipeline
from i2l_ext.converters.lora import Lora, concatenate
from i2l_ext.embed import embed
from i2l_ext.models import catalogue
from i2l_ext.models.heads import with_heads
from i2l_ext.weights.compute import NO_CALLBACKS

from . import looks, measures, things, world
from .looks import Style
from .sampler import WEIGHTS, Sampler, as_image
from .thing_classifier import ThingClassifier
from .things import THINGS

FIRST_SEED = 1_000_000
"""The seeds of the report and of the sample pictures start here. Training uses smaller ones."""

PROMPTED = tuple(THINGS)[:8]
PROMPTS = tuple(f"a {thing}" for thing in PROMPTED)
NEUTRAL_PROMPT = world.caption(None)
SIDE = 256
"""Side of the pictures that are given to the pipeline, in pixels."""


@dataclass(frozen=True)
class ClaimRow:
    """A line of the table of claims. ``holds`` is None for a figure without a bound.

    ``note``: why mini cannot show a bound that does not hold. ``guard``: for such a row, whether the
    figure is at least as good as it is known to be.
    """

    name: str
    claim: str
    measure: str
    bound: str
    value: str
    holds: bool | None
    count: str
    note: str = ""
    guard: bool = True

    @property
    def broken(self) -> bool:
        """Whether the figure is worse than it should be, so that CI fails."""
        return not self.guard or (self.holds is False and not self.note)


@dataclass(frozen=True)
class UnseenPicture:
    """A picture that was not in the training data: ``image`` for the pipeline, RGB 256 x 256; ``pixels`` at the size
    of generated images, float32 [3, 64, 64] in 0..1."""

    style: Style
    content: world.Content
    image: Image.Image
    pixels: torch.Tensor

    @classmethod
    def of(cls, style: Style, content: world.Content) -> UnseenPicture:
        """The content in the style."""
        picture = world.render([style], [content], SIDE)
        return cls(style, content, as_image(picture[0]), world.downscale(picture)[0])


def unseen_pictures(count: int, of_each: int, offset: int = 0) -> list[list[UnseenPicture]]:
    """``count`` styles with ``of_each`` pictures each, of different things. ``offset`` is added to their seeds."""
    found = []
    for number in range(count):
        rng = np.random.default_rng(FIRST_SEED + offset + number)
        style = looks.random_style(rng)
        chosen = rng.permutation(list(THINGS))[:of_each]
        found.append([UnseenPicture.of(style, world.random_content(rng, str(thing))) for thing in chosen])
    return found


class Evaluator:
    """The weights to be evaluated, loaded once."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: of a training run; the shipped weights unless given."""
        self.folder = folder or WEIGHTS
        self.sampler = Sampler(self.folder / "base.safetensors")
        self.classifier = ThingClassifier.load(self.folder / "judge.safetensors")

    @cached_property
    def digest(self) -> str:
        """Tells the weights of ``mini`` from others, the world of this code from another."""
        found = hashlib.sha256()
        parts = {Path(part.files[0]).name for part in catalogue.find("mini").parts}
        parts |= {"base.safetensors", "judge.safetensors"}
        code = [Path(str(module.__file__)) for module in (looks, things, world)]
        for path in (*(self.folder / name for name in sorted(parts)), *code):
            found.update(hashlib.sha256(path.read_bytes()).digest())
        return found.hexdigest()[:16]

    def make_lora_together(self, model_name: str, pictures: Sequence[UnseenPicture]) -> Lora:
        """One LoRA of all pictures, by a model that sees them together."""
        model = catalogue.find(model_name)
        files = self._files(model)
        opened = [images.open_image(_png(picture.image), sizes=model.views) for picture in pictures]
        embedded = embed(opened, model, files)
        shares = [1 / len(pictures)] * len(pictures)
        with ExitStack() as stack:
            [lora] = pipeline.open_parts(model, files, embedded, shares, NO_CALLBACKS, stack)
            return Lora.of(lora.arch, {path: lora[path] for path in lora})

    def _files(self, model: catalogue.I2LModel) -> dict[str, list[Path]]:
        return {part.id: [self.folder / Path(part.files[0]).name] for part in model.parts}

    def make_loras(self, model_name: str, pictures: Sequence[UnseenPicture], heads: Path | None = None) -> list[Lora]:
        """A LoRA of each picture, made as `i2l make` does; with the heads of a file in the folder if it is given."""
        model = catalogue.find(model_name)
        model = with_heads(model, heads) if heads else model
        files = self._files(model)
        opened = [images.open_image(_png(picture.image), sizes=model.views) for picture in pictures]
        embedded = embed(opened, model, files)
        loras = []
        with ExitStack() as stack:
            for n in range(len(pictures)):
                parts = pipeline.open_parts(model, files, embedded.rows(n, n + 1), [1.0], NO_CALLBACKS, stack)
                if model.bias:
                    parts = [*parts, Lora.read(self.folder / Path(model.bias.files[0]).name)]
                lora = concatenate(parts, [1.0] * len(parts))
                loras.append(Lora.of(lora.arch, {path: lora[path] for path in lora}))
        return loras

    def accuracy(self, images: torch.Tensor) -> float:
        """Share of images [..., 8, 3, 64, 64], one for each prompt, that show the prompted thing."""
        shown = self.classifier(images.flatten(0, -4)).argmax(1)
        prompted = torch.arange(len(PROMPTED)).repeat(len(shown) // len(PROMPTED))
        return (shown == prompted).float().mean().item()

    def generate(
        self, prompts: Iterable[str], lora: Lora | None = None, weight: float = 1.0, seed: int = 0
    ) -> torch.Tensor:
        """An image for each of N prompts, with seeds from ``seed`` on: [N, 3, 64, 64] in 0..1."""
        prompts = list(prompts)
        seeds = range(seed, seed + len(prompts))
        return self.sampler.generate(prompts, seeds, [(lora, weight)] if lora and weight else ())


def average_loras(loras: Sequence[Lora]) -> Lora:
    """The LoRA of several pictures, as `i2l make` combines them with equal shares."""
    return concatenate(loras, [1 / len(loras)] * len(loras))


def pixels_of(pictures: Sequence[UnseenPicture]) -> torch.Tensor:
    """The pictures at the size of generated images: [N, 3, 64, 64]."""
    return torch.stack([picture.pixels for picture in pictures])


def style_distances(images: torch.Tensor, pictures: Sequence[UnseenPicture]) -> torch.Tensor:
    """The mean style distance [N] of each picture's images [N, P, 3, 64, 64] to it."""
    return measures.mean_distances(measures.style_distance, images, pixels_of(pictures))


def spread(values: torch.Tensor, digits: int = 3) -> str:
    """Mean and standard deviation of values [N], for a table."""
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
