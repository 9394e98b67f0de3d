"""What mini's i2L models build on, each part trained from a seed: autoencoder, base, encoders, classifier of things.

The encoders learn to name a picture's style and content through one linear layer, which is not kept. The heads of an
i2L model are linear too, so they can use what a linear layer can read. For the same reason each colour is learned
twice, alone and together with its texture, ground or outline: a linear head could not multiply the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from i2l_ext.converters.files import load_file
from i2l_ext.training.base import Foundation
from i2l_ext.training.config import FoundationsConfig, Schedule
from i2l_ext.training.flow import add_noise, sample_timesteps
from i2l_ext.training.loop import TrainingTask

from . import looks, things, world
from . import trainable_encoders as encoders
from .autoencoder import CHANNELS, Autoencoder, gradient_loss
from .base import SIDE, MiniBase
from .thing_classifier import ThingClassifier

SOURCE_SIDE = 2 * world.PIXELS
"""Side at which pictures are rendered in training. They are halved for the base, and resized for the encoders."""

VIEWS = (encoders.QWEN_VL_MINI.lowres, encoders.QWEN_VL_MINI.highres)


@dataclass(frozen=True)
class Scenes:
    """Random pictures with their captions."""

    styles: list[looks.Style]
    contents: list[world.Content]
    captions: list[str]

    @classmethod
    def random(cls, count: int, seed: int, neutral: float) -> Scenes:
        """``count`` pictures, a share ``neutral`` of them in the neutral style, slightly varied. The captions of these
        name the content only, and a fifth of them not even that. The other captions name the style too."""
        rng = np.random.default_rng(seed)
        styles, contents, captions = [], [], []
        for _ in range(count):
            content = world.random_content(rng)
            plain = rng.random() < neutral
            style = _varied_neutral_style(rng) if plain else looks.random_style(rng)
            unnamed = plain and rng.random() < 0.2
            captions.append(world.caption(None if unnamed else content, None if plain else style))
            styles.append(style)
            contents.append(content)
        return cls(styles, contents, captions)


def _varied_neutral_style(rng: np.random.Generator) -> looks.Style:
    """The neutral style in slightly other greys: else nothing would be learnt of the colours around it."""
    fill, ground, line = ((grey[0] + rng.uniform(-0.05, 0.05),) * 3 for grey in looks.NEUTRAL.colours[::2])
    return replace(looks.NEUTRAL, fill=fill, second=fill, line=line, ground=ground, horizon=ground)


def render_sources(styles: Sequence[looks.Style], contents: Sequence[world.Content]) -> torch.Tensor:
    """The n-th content in the n-th style: float16 [N, 3, 128, 128] in 0..1, rendered in portions."""
    starts = range(0, len(styles), 256)
    return torch.cat([world.render(styles[i : i + 256], contents[i : i + 256], SOURCE_SIDE).half() for i in starts])


@cache
def _resize_matrix(sides: tuple[int, ...]) -> torch.Tensor:
    """Pillow's bilinear resizes from each side to the next, as one matrix [last, first]."""
    out: np.ndarray = np.eye(sides[0], dtype=np.float32)
    for start, end in pairwise(sides):
        ones = Image.fromarray(np.eye(start, dtype=np.float32))
        out = np.asarray(ones.resize((start, end), Image.Resampling.BILINEAR)) @ out
    return torch.from_numpy(out)


def encoder_view(sources: torch.Tensor, *sides: int) -> torch.Tensor:
    """Pictures resized to each of ``sides`` in turn: [N, 3, S, S] -> float32 [N, 3, side, side].

    The pipeline resizes to 1024 pixels and then for SigLIP2 and DINOv3, but directly for Qwen-VL.
    """
    matrix = _resize_matrix((sources.shape[-1], *sides))
    return torch.cat([matrix @ part.float() @ matrix.T for part in sources.split(1024)])


@dataclass(frozen=True)
class Labels:
    """What the encoders learn to tell of N pictures.

    ``colours`` [N, COLOURS]: the five colours, and then three differences between two of them, each at the position
    of the picture's texture, ground or outline, with 0 at the others. ``choices`` [N, 7]: class numbers of texture,
    ground, outline, light, thing, place and other thing.
    """

    colours: torch.Tensor
    choices: torch.Tensor

    TABLES = tuple(
        list(table)
        for table in (looks.TEXTURES, looks.GROUNDS, looks.OUTLINES, (False, True), things.THINGS,
                      (*world.PLACES, "beside"), ("", *things.THINGS))
    )  # fmt: skip
    CLASSES = tuple(map(len, TABLES))
    COLOURS = 15 + 3 * sum(CLASSES[:3])
    WIDTH = COLOURS + sum(CLASSES)
    OF_STYLE = 4
    """So many of the choices are of the style."""

    @classmethod
    def of(cls, styles: Sequence[looks.Style], contents: Sequence[world.Content]) -> Labels:
        """Labels of the n-th content in the n-th style."""
        told = [
            (s.texture, s.backdrop, s.outline, s.lit, c.thing, "beside" if c.other else c.place, c.other)
            for s, c in zip(styles, contents, strict=True)
        ]
        classes = torch.tensor([[table.index(one) for table, one in zip(cls.TABLES, row, strict=True)] for row in told])
        colours = torch.tensor([s.colours for s in styles])
        fill, second, ground, horizon, line = colours.unbind(1)
        contrasts = [
            (F.one_hot(classes[:, n], cls.CLASSES[n])[:, :, None] * contrast[:, None]).flatten(1)
            for n, contrast in enumerate((second - fill, horizon - ground, line - fill))
        ]
        return cls(torch.cat([colours.flatten(1), *contrasts], dim=1), classes)

    def loss(self, predicted: torch.Tensor, rows: torch.Tensor, content: float) -> torch.Tensor:
        """The loss, a scalar, of predictions [B, WIDTH] for the pictures ``rows`` [B]: squared error of the colours
        and cross-entropies of the choices. ``content`` is the weight of the things and their places."""
        total = 20 / 15 * (predicted[:, : self.COLOURS] - self.colours[rows]).square().sum(1).mean()
        logits = predicted[:, self.COLOURS :].split(self.CLASSES, dim=1)
        for n, part in enumerate(logits):
            weight = 0.5 if n < self.OF_STYLE else 0.5 * content
            total = total + weight * F.cross_entropy(part, self.choices[rows, n])
        return total


class ProbedEncoder(nn.Module):
    """SigLIP2 or DINOv3 with a linear layer: inputs [N, 3, S, S] -> predictions [N, Labels.WIDTH]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.encoder = encoders.ENCODER_CLASSES[kind]()
        self.probe = nn.Linear(encoders.ENCODER_DIMS[kind].width, Labels.WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.probe(encoders.pooled_embedding(self.encoder, inputs))


class ProbedQwenVL(nn.Module):
    """Qwen-VL with linear layers: each image token predicts the pixels of its square, the last token the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoders.ENCODER_CLASSES["qwen_vl"]()
        width, sides = (
            encoders.QWEN_VL_MINI.width,
            (world.PIXELS // grid for grid in map(encoders.QWEN_VL_MINI.grid, VIEWS)),
        )
        self.pixels = nn.ModuleList(nn.Linear(width, 3 * side * side) for side in sides)
        self.probe = nn.Linear(width, Labels.WIDTH)

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [N, 3, S, S] in 0..1 -> pictures [N, 3, 64, 64] and predictions [N, Labels.WIDTH]."""
        tokens = encoders.qwen_tokens(self.encoder, views)
        grid = encoders.QWEN_VL_MINI.grid(views.shape[-1])
        squares = self.pixels[VIEWS.index(views.shape[-1])](tokens[:, 1 : 1 + grid * grid])
        rows = squares.transpose(1, 2).unflatten(2, (grid, grid))
        return F.pixel_shuffle(rows, world.PIXELS // grid), self.probe(tokens[:, -1])


def build_foundations(config: FoundationsConfig, seed: int) -> Mapping[str, Foundation]:
    """The parts to be trained, by the names of their files."""

    def encoder(kind: str, schedule: Schedule, content: float) -> Foundation:
        build = partial(_encoder, schedule, config.pictures, seed, kind, content)
        return Foundation(build, partial(_encoder_weights, kind))

    return {
        "autoencoder": Foundation(
            partial(_autoencoder, config.autoencoder, config.pictures, seed), partial(_autoencoder_weights, seed)
        ),
        "siglip2": encoder("siglip2", config.siglip2, content=0.5),
        "base": Foundation(partial(_base, config.base, config.pictures, seed), needs=("autoencoder",)),
        "dinov3": encoder("dinov3", config.dinov3, content=0.2),
        "qwen_vl": Foundation(
            partial(_qwen_vl, config.qwen_vl, config.pictures, seed), partial(_encoder_weights, "qwen_vl")
        ),
        "judge": Foundation(partial(_judge, config.judge, config.pictures, seed), examples_need_it=False),
    }


def _encoder_weights(kind: str, probed: nn.Module) -> dict[str, torch.Tensor]:
    return encoders.encoder_file_weights(kind, probed.encoder)


def _small_pictures(scenes: Scenes) -> torch.Tensor:
    """The scenes at the base's size, rendered in portions: float16 [N, 3, 64, 64] in 0..1."""
    starts = range(0, len(scenes.styles), 1024)
    return torch.cat(
        [
            world.downscale(render_sources(scenes.styles[i : i + 1024], scenes.contents[i : i + 1024]).float()).half()
            for i in starts
        ]
    )


def _autoencoder(schedule: Schedule, count: int, seed: int, folder: Path) -> TrainingTask:
    pictures = _small_pictures(Scenes.random(count, seed + 6, neutral=0.1))
    torch.manual_seed(seed)

    def loss(model: nn.Module, rng: torch.Generator, local: slice) -> torch.Tensor:
        seen = pictures[torch.randint(count, (schedule.batch,), generator=rng)[local]].float()
        noise = torch.randn(schedule.batch, CHANNELS, SIDE, SIDE, generator=rng)[local]
        drawn = model(seen, noise).float()
        return F.l1_loss(drawn, seen) + gradient_loss(drawn, seen)

    return TrainingTask("autoencoder", Autoencoder(), loss, schedule, seed)


def _autoencoder_weights(seed: int, autoencoder: nn.Module) -> dict[str, torch.Tensor]:
    autoencoder.standardise(_small_pictures(Scenes.random(2048, seed + 7, neutral=0.4)).float())
    return autoencoder.state_dict()


def _base(schedule: Schedule, count: int, seed: int, folder: Path) -> TrainingTask:
    scenes = Scenes.random(count, seed + 1, neutral=0.4)
    torch.manual_seed(seed)
    base = MiniBase()
    base.autoencoder.load_state_dict(load_file(folder / "autoencoder.safetensors"))
    x = base.encode_pictures(_small_pictures(scenes)).half()
    text, mask = base.encode_prompts(scenes.captions)
    batch = schedule.batch

    def loss(model: nn.Module, rng: torch.Generator, local: slice) -> torch.Tensor:
        rows, t = torch.randint(len(x), (batch,), generator=rng)[local], sample_timesteps(batch, rng)[local]
        x_t, velocity = add_noise(x[rows].float(), t, torch.randn(batch, *x.shape[1:], generator=rng)[local])
        return F.mse_loss(model(x_t, t, text[rows], mask[rows]), velocity)

    return TrainingTask("base", base, loss, schedule, seed)


def _encoder(schedule: Schedule, count: int, seed: int, kind: str, content: float, folder: Path) -> TrainingTask:
    scenes = Scenes.random(count, seed + 2, neutral=0.05)
    labels = Labels.of(scenes.styles, scenes.contents)
    inputs = encoders.normalize_pixels(
        kind, encoder_view(render_sources(scenes.styles, scenes.contents), 1024, encoders.ENCODER_DIMS[kind].image)
    )
    torch.manual_seed(seed)
    module = ProbedEncoder(kind)

    def loss(model: nn.Module, rng: torch.Generator, local: slice) -> torch.Tensor:
        rows = torch.randint(count, (schedule.batch,), generator=rng)[local]
        return labels.loss(model(inputs[rows]).float(), rows, content)

    return TrainingTask(kind, module, loss, schedule, seed)


def _qwen_vl(schedule: Schedule, count: int, seed: int, folder: Path) -> TrainingTask:
    scenes = Scenes.random(count, seed + 3, neutral=0.05)
    labels = Labels.of(scenes.styles, scenes.contents)
    sources = render_sources(scenes.styles, scenes.contents)
    views, small = [encoder_view(sources, side) for side in VIEWS], world.downscale(sources.float())
    torch.manual_seed(seed)
    module = ProbedQwenVL()

    def loss(model: nn.Module, rng: torch.Generator, local: slice) -> torch.Tensor:
        rows = torch.randint(count, (schedule.batch,), generator=rng)[local]
        # One view in each step: DistributedDataParallel allows one forward of a module.
        inputs = views[int(torch.randint(len(VIEWS), (), generator=rng))]
        picture, labelled = model(inputs[rows])
        return 20 * F.mse_loss(picture.float(), small[rows]) + 0.2 * labels.loss(labelled.float(), rows, 1.0)

    return TrainingTask("qwen_vl", module, loss, schedule, seed)


def _judge(schedule: Schedule, count: int, seed: int, folder: Path) -> TrainingTask:
    scenes = Scenes.random(count, seed + 4, neutral=0.3)
    alone = [n for n, content in enumerate(scenes.contents) if not content.other]
    labels = torch.tensor([list(things.THINGS).index(scenes.contents[n].thing) for n in alone])
    small = _small_pictures(scenes)[alone].float()
    torch.manual_seed(seed)

    def loss(model: nn.Module, rng: torch.Generator, local: slice) -> torch.Tensor:
        rows = torch.randint(len(alone), (schedule.batch,), generator=rng)
        # Generated images are noisier than rendered ones.
        noise = torch.rand(schedule.batch, 1, 1, 1, generator=rng) * 0.1
        noisy = small[rows] + noise * torch.randn(schedule.batch, *small.shape[1:], generator=rng)
        return F.cross_entropy(model(noisy[local]).float(), labels[rows][local])

    return TrainingTask("judge", ThingClassifier(), loss, schedule, seed)
