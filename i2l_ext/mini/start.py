"""Training a LoRA on a few pictures of one style, from random factors and from the LoRA that i2L makes of them.

Two losses are measured, each with fixed timesteps and noise: on the eight pictures that are trained on, and on eight
others of the same style and shapes at other places.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import nn

from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.lora import Lora
from i2l_ext.training.flow import add_noise, sample_timesteps
from i2l_ext.training.heads import PerSampleLora

from . import world
from .base import MiniBase
from .evaluation import PROMPTS, Evaluator, UnseenPicture, average_loras, unseen_pictures
from .sampler import as_image
from .sheets import image_grid

STEPS = 500
EVERY = 20
"""The losses are measured at every so many steps."""
BATCH = 8
RANK = 8
RATES = (3e-4, 1e-3)
"""AdamW's learning rates, the same for both starts. LoRA trainers suggest 1e-4 to 3e-4; the upper end favours the
random start, which has more to learn. The second rate, which is reported too, overfits eight pictures in 500 steps."""
SHOWN = (100, 200, 300, 400, 500)
"""The steps at which an image is generated."""


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""One LoRA, by module path: down [rank, d_in] and up [d_out, rank]."""


@dataclass
class StartComparison:
    """Two trainings, ``random`` and ``i2l`` by their starts.

    ``losses``: [measurements, 2], on the pictures trained on and on the others; ``images``: those at ``SHOWN``.
    """

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    reference: Image.Image | None = None
    images: dict[str, list[Image.Image]] = field(default_factory=dict)

    def i2l_steps_to_random_end(self, which: int) -> int:
        """Steps that the i2L start needs to the last loss of the random start; STEPS if it does not reach it.
        ``which``: 0 for the pictures trained on, 1 for the others."""
        return self._first("i2l", which, self.losses["random"][-1, which])

    def random_steps_to_i2l_start(self, which: int) -> int:
        """Steps that the random start needs to the first loss of the i2L start; STEPS if it does not reach it."""
        return self._first("random", which, self.losses["i2l"][0, which])

    def _first(self, start: str, which: int, goal: torch.Tensor) -> int:
        return next((n * EVERY for n, loss in enumerate(self.losses[start][:, which]) if loss <= goal), STEPS)


def truncated_factors(lora: Lora, rank: int) -> Factors:
    """The best approximation of each update at a rank (Eckart and Young 1936), down and up of equal norms."""
    out = {}
    for path in lora:
        u, s, v = torch.linalg.svd(lora.delta(path), full_matrices=False)
        root = s[:rank].sqrt()
        out[path] = (root[:, None] * v[:rank], u[:, :rank] * root)
    return out


def random_factors(rank: int, seed: int) -> Factors:
    """The usual start of a LoRA: down uniform as in nn.Linear, up zero."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for path, module in MINI.i2l_modules.items():
        d_out, d_in = module.shape
        bound = d_in**-0.5
        out[path] = ((2 * torch.rand(rank, d_in, generator=rng) - 1) * bound, torch.zeros(d_out, rank))
    return out


def compare_starts(evaluator: Evaluator, seed: int, rate: float, show: bool = False) -> StartComparison:
    """Both trainings on the same eight pictures of one unseen style, in the same order with the same noise. Images
    are generated only with ``show``."""
    [group] = unseen_pictures(1, 8, offset=30_000 + seed)
    others = _at_other_places(group, seed)
    rng = torch.Generator().manual_seed(seed)
    found = StartComparison(reference=group[0].image)
    made = truncated_factors(average_loras(evaluator.make_loras("mini", group[:4])), RANK)
    for name, start in (("random", random_factors(RANK, seed)), ("i2l", made)):
        rng.manual_seed(seed)
        found.losses[name], found.images[name] = _train_lora(
            evaluator.sampler.base, start, group, others, rng, rate, show
        )
    return found


def _at_other_places(group: Sequence[UnseenPicture], seed: int) -> list[UnseenPicture]:
    """Pictures of the same style and shapes."""
    rng = np.random.default_rng(40_000_000 + seed)
    return [UnseenPicture.of(one.style, world.random_content(rng, one.content.shape)) for one in group]


def _train_lora(
    base: MiniBase,
    start: Factors,
    group: Sequence[UnseenPicture],
    others: Sequence[UnseenPicture],
    rng: torch.Generator,
    rate: float,
    show: bool,
) -> tuple[torch.Tensor, list[Image.Image]]:
    """Losses [measurements, 2] and images of one training."""
    hooks = PerSampleLora(base.transformer, start)
    factors = {
        path: (nn.Parameter(down.clone()[None]), nn.Parameter(up.clone()[None])) for path, (down, up) in start.items()
    }
    hooks.factors = factors
    optimizer = torch.optim.AdamW([p for pair in factors.values() for p in pair], lr=rate, weight_decay=0.01)
    x, text, mask = _encode_pictures(base, group)
    fixed = torch.Generator().manual_seed(7)
    measured = [_FixedLoss(*_encode_pictures(base, pictures), fixed) for pictures in (group, others)]
    losses, images = [[loss(base) for loss in measured]], []
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(x), (BATCH,), generator=rng)
        t = sample_timesteps(BATCH, rng)
        x_t, velocity = add_noise(x[chosen], t, torch.randn(BATCH, *x.shape[1:], generator=rng))
        (base(x_t, t, text[chosen], mask[chosen]) - velocity).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            losses.append([loss(base) for loss in measured])
        if show and step in SHOWN:
            images.append(as_image(base.generate([PROMPTS[0]], [0])[0]))
    hooks.remove()
    return torch.tensor(losses), images


class _FixedLoss:
    """The loss on pictures at fixed timesteps, spread evenly, and with fixed noise: four of each for a picture."""

    def __init__(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, rng: torch.Generator) -> None:
        rows = torch.arange(len(x)).repeat_interleave(4)
        self.t = (torch.arange(len(rows)) % 4 + torch.rand(len(rows), generator=rng)) / 4
        self.x_t, self.velocity = add_noise(x[rows], self.t, torch.randn(len(rows), *x.shape[1:], generator=rng))
        self.text, self.mask = text[rows], mask[rows]

    @torch.no_grad()
    def __call__(self, base: nn.Module) -> float:
        return (base(self.x_t, self.t, self.text, self.mask) - self.velocity).square().mean().item()


def _encode_pictures(
    base: MiniBase, pictures: Sequence[UnseenPicture]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels in -1..1, and text and mask of captions that name the content."""
    text, mask = base.encode_prompts([world.caption(picture.content) for picture in pictures])
    return torch.stack([2 * picture.pixels - 1 for picture in pictures]), text, mask


def plot_starts(runs: Sequence[StartComparison]) -> Image.Image:
    """Loss over steps, on both sets of pictures: a thin line for each comparison, a thick one for their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    steps = range(0, STEPS + 1, EVERY)
    for which, title in enumerate(("the eight pictures in training", "eight others of the style")):
        axes = figure.add_subplot(1, 2, which + 1)
        for name, colour, words in (("random", "tab:gray", "random start"), ("i2l", "tab:blue", "start from i2L")):
            lines = torch.stack([run.losses[name][:, which] for run in runs])
            for line in lines:
                axes.plot(steps, line, color=colour, linewidth=0.6, alpha=0.6)
            axes.plot(steps, lines.mean(0), color=colour, linewidth=2.2, label=words)
        axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axes.legend()
        axes.grid(alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return Image.open(stream).convert("RGB")


def start_sheet(run: StartComparison) -> Image.Image:
    """The images of both trainings, step by step."""
    rows = [[run.reference, *run.images[name]] for name in ("random", "i2l")]
    return image_grid(rows, ["reference", *(f"{step} steps" for step in SHOWN)], 96)
