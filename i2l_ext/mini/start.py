"""Training a LoRA on a few pictures of one style: from a random start, and from the LoRA that i2L makes of them.

Two losses are followed, both with times and noises fixed beforehand: on the eight pictures that are trained on, and
on eight others of the same style and shapes at other places.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.files import load_file
from i2l_ext.converters.lora import Lora
from i2l_ext.mini import dataset, world
from i2l_ext.mini.evaluation import PROMPTS, SIDE, Lab, Sample, mean_of, unseen
from i2l_ext.training.config import Expert
from i2l_ext.training.flow import mixed, times
from i2l_ext.training.heads import Heads, PerSample

from .draw import as_image, sheet

STEPS = 500
EVERY = 20
BATCH = 8
RANK = 8
RATES = (3e-4, 1e-3)
"""AdamW's learning rates, the same for both starts. LoRA trainers start with 1e-4 to 3e-4; the upper end favours the
random start, which has further to go. The second, reported beside it, overfits eight pictures within 500 steps."""
SHOWN = (100, 200, 300, 400, 500)


@dataclass
class Run:
    """By start, ``random`` and ``i2l``: [loss in training, loss held out] at every ``EVERY``-th step, 0 included, and
    drawings at ``SHOWN``."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    reference: Image.Image | None = None
    drawings: dict[str, list[Image.Image]] = field(default_factory=dict)

    def reached(self, which: int) -> int:
        """The first step at which the i2L start is as good as the random start in the end; STEPS if never."""
        return self._first("i2l", which, self.losses["random"][-1, which])

    def worth(self, which: int) -> int:
        """The first step at which the random start is as good as the i2L start before its first step."""
        return self._first("random", which, self.losses["i2l"][0, which])

    def _first(self, start: str, which: int, goal: torch.Tensor) -> int:
        return next((n * EVERY for n, loss in enumerate(self.losses[start][:, which]) if loss <= goal), STEPS)


def factors(lora: Lora, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The LoRA reset to a rank: the best approximation of each update (Eckart and Young 1936), its weight shared
    evenly by both factors."""
    out = {}
    for path in lora:
        u, s, v = torch.linalg.svd(lora.delta(path), full_matrices=False)
        root = s[:rank].sqrt()
        out[path] = (root[:, None] * v[:rank], u[:, :rank] * root)
    return out


def fresh(rank: int, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A usual start: down random (uniform, as nn.Linear is), up zero."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for path, module in MINI.i2l_modules.items():
        d_out, d_in = module.shape
        bound = d_in**-0.5
        out[path] = ((2 * torch.rand(rank, d_in, generator=rng) - 1) * bound, torch.zeros(d_out, rank))
    return out


def compare(lab: Lab, seed: int, rate: float, pictures: bool = False) -> Run:
    """Both trainings on the same eight pictures of one unseen style, in the same order with the same noise."""
    [group] = unseen(1, 8, offset=30_000 + seed)
    [held] = unseen(1, 8, offset=30_000 + seed)
    rng = torch.Generator().manual_seed(seed)
    held = _other_places(held, seed)
    run = Run(reference=group[0].image)
    made = factors(mean_of(lab.loras("mini", group[:4])), RANK)
    for name, start in (("random", fresh(RANK, seed)), ("i2l", made)):
        rng.manual_seed(seed)
        run.losses[name], run.drawings[name] = _train(lab, start, group, held, rng, rate, pictures)
    return run


def _other_places(group: list[Sample], seed: int) -> list[Sample]:
    """The same style and shapes at other places: what the loss is measured on."""
    rng = np.random.default_rng(40_000_000 + seed)
    return [Sample.of(sample.style, world.random_content(rng, sample.content.shape)) for sample in group]


def _train(
    lab: Lab,
    start: dict[str, tuple[torch.Tensor, torch.Tensor]],
    group: Sequence[Sample],
    held: Sequence[Sample],
    rng: torch.Generator,
    rate: float,
    pictures: bool,
) -> tuple[torch.Tensor, list[Image.Image]]:
    base = lab.painter.base
    pairs = {path: tuple(nn.Parameter(part.clone()[None]) for part in pair) for path, pair in start.items()}
    hooks = PerSample(base.transformer, pairs)
    optimizer = torch.optim.AdamW([p for pair in pairs.values() for p in pair], lr=rate, weight_decay=0.01)
    x, text, mask = _batch(lab, group)
    fixed = torch.Generator().manual_seed(7)
    goals = [_Goal(*_batch(lab, pictures), fixed) for pictures in (group, held)]

    def wear() -> None:
        hooks.pairs = pairs

    def measured() -> list[float]:
        wear()
        return [goal.loss(base) for goal in goals]

    losses, drawings = [measured()], []
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(x), (BATCH,), generator=rng)
        now = times(BATCH, rng)
        noisy, wanted = mixed(x[chosen], now, torch.randn(BATCH, *x.shape[1:], generator=rng))
        wear()
        loss = (base(noisy, now, text[chosen], mask[chosen]) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            losses.append(measured())
        if pictures and step in SHOWN:
            wear()
            drawings.append(as_image(base.draw([PROMPTS[0]], [0])[0]))
    hooks.pairs = {}
    hooks.remove()
    return torch.tensor(losses), drawings


class _Goal:
    """A loss over pictures with fixed times, spread evenly, and fixed noises: four of each a picture."""

    def __init__(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, rng: torch.Generator) -> None:
        rows = torch.arange(len(x)).repeat_interleave(4)
        self.t = (torch.arange(len(rows)) % 4 + torch.rand(len(rows), generator=rng)) / 4
        self.x, self.target = mixed(x[rows], self.t, torch.randn(len(rows), *x.shape[1:], generator=rng))
        self.text, self.mask = text[rows], mask[rows]

    @torch.no_grad()
    def loss(self, base: nn.Module) -> float:
        return (base(self.x, self.t, self.text, self.mask) - self.target).square().mean().item()


def _batch(lab: Lab, group: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    text, mask = lab.painter.base.read([world.caption(sample.content) for sample in group])
    return torch.stack([2 * sample.small - 1 for sample in group]), text, mask


def curves(runs: Sequence[Run]) -> Image.Image:
    """Loss over steps, in training and held out: thin lines a seed, thick ones their mean."""
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


def table(run: Run) -> Image.Image:
    """Drawings of one seed along both trainings."""
    rows = [[run.reference, *run.drawings[name]] for name in ("random", "i2l")]
    return sheet(rows, ["reference", *(f"{step} steps" for step in SHOWN)], 96)


def other_loras(lab: Lab, path: Path, samples: Sequence[Sample], expert: Expert) -> list[Lora]:
    """LoRAs by heads that are in no model of the catalogue, made by the training code."""
    sources = torch.stack([world.render([s.style], [s.content], SIDE)[0] for s in samples])
    embeddings = dataset.image_embeddings(sources, lab.folder)
    heads = Heads(MINI, embedding=embeddings.shape[1], compress=expert.compress, rank=expert.rank, kind=expert.kind)
    heads.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    with torch.no_grad():
        pairs = heads.eval()(embeddings)
    return [Lora.of(MINI, {path: (a[n], b[n]) for path, (a, b) in pairs.items()}) for n in range(len(samples))]
