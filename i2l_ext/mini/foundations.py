"""What the miniature stands on, each trained from a seed: base model, encoders, and the judge of shapes.

The encoders learn to name a picture's style and content through one linear layer, which is then thrown away: the
heads that follow are linear too, and can use what a linear layer can read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from i2l_ext.training.config import Foundations
from i2l_ext.training.flow import mixed, times
from i2l_ext.training.loop import Task

from . import models, world
from .base import Base
from .judge import Judge

SOURCE = 2 * world.PIXELS
"""Side at which pictures are rendered in training: halved for the base, resampled as the pipeline does for encoders."""


def scenes(count: int, seed: int, neutral: float = 0.0) -> tuple[list[world.Style], list[world.Content]]:
    """Random pictures, ``neutral`` of them in a slightly varied neutral style."""
    rng = np.random.default_rng(seed)
    styles, contents = [], []
    for _ in range(count):
        contents.append(world.random_content(rng))
        styles.append(_plain(rng) if rng.random() < neutral else world.random_style(rng))
    return styles, contents


def _plain(rng: np.random.Generator) -> world.Style:
    fill, ground = (0.30 + rng.uniform(-0.05, 0.05),) * 3, (0.88 + rng.uniform(-0.05, 0.05),) * 3
    return replace(world.NEUTRAL, fill=fill, second=fill, line=fill, ground=ground, horizon=ground)


def pictures(styles: list[world.Style], contents: list[world.Content]) -> torch.Tensor:
    """float16 [N, 3, 64, 64], rendered in portions."""
    portions = range(0, len(styles), 256)
    return torch.cat([world.render(styles[i : i + 256], contents[i : i + 256], SOURCE).half() for i in portions])


@cache
def resampling(source: int, side: int) -> torch.Tensor:
    """Pillow's bilinear resize source -> 1024 -> side, the pipeline's way, as one matrix [side, source]."""

    def matrix(start: int, end: int) -> np.ndarray:
        return np.asarray(Image.fromarray(np.eye(start, dtype=np.float32)).resize((start, end), Image.Resampling.BILINEAR))

    return torch.from_numpy(matrix(1024, side) @ matrix(source, 1024))


def view(sources: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures as an encoder sees them: [N, 3, S, S] -> float32 [N, 3, side, side] in 0..1."""
    matrix = resampling(sources.shape[-1], side)
    return matrix @ sources.float() @ matrix.T


@dataclass(frozen=True)
class Labels:
    """What there is to say of a picture: 15 colour values, and five choices as class numbers."""

    colours: torch.Tensor
    choices: torch.Tensor

    CLASSES = (len(world.TEXTURES), len(world.GROUNDS), 2, len(world.SHAPES), len(world.PLACES))
    WIDTH = 15 + sum(CLASSES)

    @classmethod
    def of(cls, styles: list[world.Style], contents: list[world.Content]) -> Labels:
        tables = [list(table) for table in (world.TEXTURES, world.GROUNDS, world.SHAPES, world.PLACES)]
        choices = [
            (tables[0].index(s.texture), tables[1].index(s.backdrop), int(s.outlined), tables[2].index(c.shape),
             tables[3].index(c.place))
            for s, c in zip(styles, contents, strict=True)
        ]  # fmt: skip
        return cls(torch.tensor([s.colours for s in styles]).flatten(1), torch.tensor(choices))

    def loss(self, said: torch.Tensor, rows: torch.Tensor, content: float) -> torch.Tensor:
        """Squared error of the colours and cross-entropies of the choices, those of the content times ``content``."""
        total = 20 * F.mse_loss(said[:, :15], self.colours[rows])
        weights = (0.5, 0.5, 0.5, 0.5 * content, 0.5 * content)
        logits = said[:, 15:].split(self.CLASSES, dim=1)
        for n, (part, weight) in enumerate(zip(logits, weights, strict=True)):
            total = total + weight * F.cross_entropy(part, self.choices[rows, n])
        return total


class Probed(nn.Module):
    """An encoder and the linear layer that it is taught through."""

    def __init__(self, encoder: nn.Module, width: int, embed: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.encoder, self.embed = encoder, embed
        self.probe = nn.Linear(width, Labels.WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.probe(self.embed(self.encoder, inputs))


class Told(nn.Module):
    """Qwen-VL and what it is taught through: each image token tells the pixels of its square, the last token the
    labels."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.pixels = nn.Linear(models.QWEN_VL.width, 3 * 8 * 8)
        self.probe = nn.Linear(models.QWEN_VL.width, Labels.WIDTH)

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = models.tokens(self.encoder, views)
        grid = models.QWEN_VL.grid(views.shape[-1])
        squares = self.pixels(tokens[:, 1 : 1 + grid * grid])
        return squares, self.probe(tokens[:, -1])


def tasks(config: Foundations, seed: int) -> Iterator[tuple[str, Callable[[], Task]]]:
    """What is to be trained, by name; each is built when it is called, so that only its own data are made."""
    yield "base", lambda: _base(config, seed)
    yield "siglip2", lambda: _encoder(config, seed, "siglip2", models.siglip2(), content=1.0)
    yield "dinov3", lambda: _encoder(config, seed, "dinov3", models.dinov3(), content=0.2)
    yield "qwen_vl", lambda: _qwen_vl(config, seed)
    yield "judge", lambda: _judge(config, seed)


def _rows(rng: torch.Generator, pool: int, batch: int) -> torch.Tensor:
    return torch.randint(pool, (batch,), generator=rng)


def _base(config: Foundations, seed: int) -> Task:
    """40 % neutral pictures, of which a fifth with a caption that says nothing; 60 % with their style in words."""
    styles, contents = scenes(config.pictures, seed + 1, neutral=0.4)
    rng = np.random.default_rng(seed + 2)
    captions = []
    for style, content in zip(styles, contents, strict=True):
        plain = style.fill == style.second == style.line and style.ground == style.horizon and len(set(style.fill)) == 1
        captions.append(world.caption(content if not plain or rng.random() < 0.8 else None, None if plain else style))
    x = world.shrink(pictures(styles, contents).float()) * 2 - 1
    torch.manual_seed(seed)
    base = Base()
    text, mask = base.read(captions)

    def loss(model: nn.Module, rng: torch.Generator, mine: slice) -> torch.Tensor:
        rows, t = _rows(rng, len(x), config.base.batch)[mine], times(config.base.batch, rng)[mine]
        noise = torch.randn(config.base.batch, *x.shape[1:], generator=rng)[mine]
        x_t, target = mixed(x[rows], t, noise)
        return F.mse_loss(model(x_t, t, text[rows], mask[rows]).float(), target)

    return Task("base", base, loss, config.base, seed)


def _encoder(config: Foundations, seed: int, name: str, build: Callable[[], nn.Module], content: float) -> Task:
    schedule: object = getattr(config, name)
    styles, contents = scenes(config.pictures, seed + 3, neutral=0.05)
    labels, dims = Labels.of(styles, contents), models.DIMS[name]
    inputs = models.normalised(name, view(pictures(styles, contents), dims.image))
    torch.manual_seed(seed)
    module = Probed(build(), dims.width, models.EMBED[name])

    def loss(model: nn.Module, rng: torch.Generator, mine: slice) -> torch.Tensor:
        rows = _rows(rng, len(inputs), schedule.batch)[mine]
        return labels.loss(model(inputs[rows]).float(), rows, content)

    return Task(name, module, loss, schedule, seed)
