"""What the miniature stands on, each trained from a seed: base model, encoders, and the judge of shapes.

The encoders learn to name a picture's style and content through one linear layer, which is then thrown away: the
heads that follow are linear too, and can use what a linear layer can read. That is why colours are asked for twice, by
themselves and by the texture, ground or outline that they are seen in: a linear head could not multiply the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from i2l_ext.mini.shape_classifier import Judge
from i2l_ext.training.config import Foundations, Schedule
from i2l_ext.training.flow import mixed, times
from i2l_ext.training.loop import Task

from . import models, world
from .base import Base

SOURCE = 2 * world.PIXELS
"""Side at which pictures are rendered in training: halved for the base, resampled as the pipeline does for encoders."""

VIEWS = (models.QWEN_VL_MINI.lowres, models.QWEN_VL_MINI.highres)


@dataclass(frozen=True)
class Scenes:
    """Random pictures with their captions."""

    styles: list[world.Style]
    contents: list[world.Content]
    captions: list[str]

    @classmethod
    def random(cls, count: int, seed: int, neutral: float) -> Scenes:
        """``neutral`` of them in the neutral style, slightly varied; their captions are silent on style, and a fifth
        of them on content too. The captions of the others tell the style."""
        rng = np.random.default_rng(seed)
        styles, contents, captions = [], [], []
        for _ in range(count):
            content = world.random_content(rng)
            plain = rng.random() < neutral
            style = _plain(rng) if plain else world.random_style(rng)
            silent = plain and rng.random() < 0.2
            captions.append(world.caption(None if silent else content, None if plain else style))
            styles.append(style)
            contents.append(content)
        return cls(styles, contents, captions)


def _plain(rng: np.random.Generator) -> world.Style:
    fill, ground = (0.30 + rng.uniform(-0.05, 0.05),) * 3, (0.88 + rng.uniform(-0.05, 0.05),) * 3
    return replace(world.NEUTRAL, fill=fill, second=fill, line=fill, ground=ground, horizon=ground)


def pictures(styles: Sequence[world.Style], contents: Sequence[world.Content]) -> torch.Tensor:
    """float16 [N, 3, 64, 64], rendered in portions."""
    portions = range(0, len(styles), 256)
    return torch.cat([world.render(styles[i : i + 256], contents[i : i + 256], SOURCE).half() for i in portions])


@cache
def _resampling(sides: tuple[int, ...]) -> torch.Tensor:
    """Pillow's bilinear resizes from side to side, as one matrix [last, first]."""
    out: np.ndarray = np.eye(sides[0], dtype=np.float32)
    for start, end in pairwise(sides):
        ones = Image.fromarray(np.eye(start, dtype=np.float32))
        out = np.asarray(ones.resize((start, end), Image.Resampling.BILINEAR)) @ out
    return torch.from_numpy(out)


def view(sources: torch.Tensor, *sides: int) -> torch.Tensor:
    """Pictures as an encoder sees them, resized from side to side: [N, 3, S, S] -> float32 [N, 3, side, side].

    The pipeline resizes for SigLIP2 and DINOv3 by way of 1024 pixels, for Qwen-VL directly.
    """
    matrix = _resampling((sources.shape[-1], *sides))
    return torch.cat([matrix @ part.float() @ matrix.T for part in sources.split(1024)])


@dataclass(frozen=True)
class Labels:
    """What there is to say of a picture: its five colours, how three of them differ from what they are seen against,
    each in the place of its texture, ground or outline and 0 elsewhere; and five choices as class numbers."""

    colours: torch.Tensor
    choices: torch.Tensor

    CLASSES = (len(world.TEXTURES), len(world.GROUNDS), 2, len(world.SHAPES), len(world.PLACES))
    COLOURS = 15 + 3 * sum(CLASSES[:3])
    WIDTH = COLOURS + sum(CLASSES)

    @classmethod
    def of(cls, styles: Sequence[world.Style], contents: Sequence[world.Content]) -> Labels:
        tables = [list(table) for table in (world.TEXTURES, world.GROUNDS, world.SHAPES, world.PLACES)]
        choices = [
            (tables[0].index(s.texture), tables[1].index(s.backdrop), int(s.outlined), tables[2].index(c.shape),
             tables[3].index(c.place))
            for s, c in zip(styles, contents, strict=True)
        ]  # fmt: skip
        colours, classes = torch.tensor([s.colours for s in styles]), torch.tensor(choices)
        fill, second, ground, horizon, line = colours.unbind(1)
        seen = [
            (F.one_hot(classes[:, n], cls.CLASSES[n])[:, :, None] * contrast[:, None]).flatten(1)
            for n, contrast in enumerate((second - fill, horizon - ground, line - fill))
        ]
        return cls(torch.cat([colours.flatten(1), *seen], dim=1), classes)

    def loss(self, said: torch.Tensor, rows: torch.Tensor, content: float) -> torch.Tensor:
        """Squared error of the colours and cross-entropies of the choices, those of the content times ``content``."""
        total = 20 / 15 * (said[:, : self.COLOURS] - self.colours[rows]).square().sum(1).mean()
        weights = (0.5, 0.5, 0.5, 0.5 * content, 0.5 * content)
        logits = said[:, self.COLOURS :].split(self.CLASSES, dim=1)
        for n, (part, weight) in enumerate(zip(logits, weights, strict=True)):
            total = total + weight * F.cross_entropy(part, self.choices[rows, n])
        return total


class Probed(nn.Module):
    """SigLIP2 or DINOv3, and the linear layer that it is taught through."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.encoder = models.BUILD[kind]()
        self.probe = nn.Linear(models.DIMS[kind].width, Labels.WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.probe(models.pooled(self.encoder, inputs))


class Told(nn.Module):
    """Qwen-VL, taught through two linear layers: each image token tells the pixels of its square at the size of the
    drawn picture, and the last token tells the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = models.BUILD["qwen_vl"]()
        width, sides = (
            models.QWEN_VL_MINI.width,
            (world.PIXELS // grid for grid in map(models.QWEN_VL_MINI.grid, VIEWS)),
        )
        self.pixels = nn.ModuleList(nn.Linear(width, 3 * side * side) for side in sides)
        self.probe = nn.Linear(width, Labels.WIDTH)

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [N, 3, S, S] in 0..1 -> pictures [N, 3, 32, 32] and logits."""
        tokens = models.tokens(self.encoder, views)
        grid = models.QWEN_VL_MINI.grid(views.shape[-1])
        squares = self.pixels[VIEWS.index(views.shape[-1])](tokens[:, 1 : 1 + grid * grid])
        rows = squares.transpose(1, 2).unflatten(2, (grid, grid))
        return F.pixel_shuffle(rows, world.PIXELS // grid), self.probe(tokens[:, -1])


def tasks(config: Foundations, seed: int) -> dict[str, Callable[[], Task]]:
    """What is to be trained, by name; its data are made when it is called."""
    return {
        "base": lambda: _base(config, seed),
        "siglip2": lambda: _encoder(config.siglip2, config.pictures, seed, "siglip2", content=0.5),
        "dinov3": lambda: _encoder(config.dinov3, config.pictures, seed, "dinov3", content=0.2),
        "qwen_vl": lambda: _qwen_vl(config.qwen_vl, config.pictures, seed),
        "judge": lambda: _judge(config.judge, config.pictures, seed),
    }


def weights(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """What is kept of a trained task, under the keys of the file."""
    return models.named_as_in_files(name, module.encoder) if hasattr(module, "encoder") else module.state_dict()


def _base(config: Foundations, seed: int) -> Task:
    scenes = Scenes.random(config.pictures, seed + 1, neutral=0.4)
    x = 2 * world.shrink(pictures(scenes.styles, scenes.contents).float()) - 1
    torch.manual_seed(seed)
    base = Base()
    text, mask = base.read(scenes.captions)
    batch = config.base.batch

    def loss(model: nn.Module, rng: torch.Generator, mine: slice) -> torch.Tensor:
        rows, t = torch.randint(len(x), (batch,), generator=rng)[mine], times(batch, rng)[mine]
        x_t, target = mixed(x[rows], t, torch.randn(batch, *x.shape[1:], generator=rng)[mine])
        return F.mse_loss(model(x_t, t, text[rows], mask[rows]), target)

    return Task("base", base, loss, config.base, seed)


def _encoder(schedule: Schedule, count: int, seed: int, kind: str, content: float) -> Task:
    scenes = Scenes.random(count, seed + 2, neutral=0.05)
    labels = Labels.of(scenes.styles, scenes.contents)
    inputs = models.normalised(kind, view(pictures(scenes.styles, scenes.contents), 1024, models.DIMS[kind].image))
    torch.manual_seed(seed)
    module = Probed(kind)

    def loss(model: nn.Module, rng: torch.Generator, mine: slice) -> torch.Tensor:
        rows = torch.randint(count, (schedule.batch,), generator=rng)[mine]
        return labels.loss(model(inputs[rows]).float(), rows, content)

    return Task(kind, module, loss, schedule, seed)


def _qwen_vl(schedule: Schedule, count: int, seed: int) -> Task:
    scenes = Scenes.random(count, seed + 3, neutral=0.05)
    labels = Labels.of(scenes.styles, scenes.contents)
    sources = pictures(scenes.styles, scenes.contents)
    views, drawn = [view(sources, side) for side in VIEWS], world.shrink(sources.float())
    torch.manual_seed(seed)
    module = Told()

    def loss(model: nn.Module, rng: torch.Generator, mine: slice) -> torch.Tensor:
        rows = torch.randint(count, (schedule.batch,), generator=rng)[mine]
        # One view a step: two forwards of one module in a step are more than DistributedDataParallel allows.
        inputs = views[int(torch.randint(len(VIEWS), (), generator=rng))]
        picture, said = model(inputs[rows])
        return 20 * F.mse_loss(picture.float(), drawn[rows]) + 0.2 * labels.loss(said.float(), rows, 1.0)

    return Task("qwen_vl", module, loss, schedule, seed)


def _judge(schedule: Schedule, count: int, seed: int) -> Task:
    scenes = Scenes.random(count, seed + 4, neutral=0.3)
    shapes = torch.tensor([list(world.SHAPES).index(content.shape) for content in scenes.contents])
    drawn = world.shrink(pictures(scenes.styles, scenes.contents).float())
    torch.manual_seed(seed)

    def loss(model: nn.Module, rng: torch.Generator, mine: slice) -> torch.Tensor:
        rows = torch.randint(count, (schedule.batch,), generator=rng)
        # Drawings are never as clean as the world.
        noise = torch.rand(schedule.batch, 1, 1, 1, generator=rng) * 0.1
        noisy = drawn[rows] + noise * torch.randn(schedule.batch, *drawn.shape[1:], generator=rng)
        return F.cross_entropy(model(noisy[mine]).float(), shapes[rows][mine])

    return Task("judge", Judge(), loss, schedule, seed)
