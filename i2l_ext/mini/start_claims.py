"""The LoRA of i2L as the start of a LoRA training, against the starts that trainers make themselves.

Each start is trained at its own best rate. The rate is chosen on styles that are not counted; what is compared is the
loss on held-out pictures.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image

from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.lora import Lora
from i2l_ext.converters.rank import resize
from i2l_ext.converters.trainers.base import FRESH_ROWS
from i2l_ext.training.heads import LoraFactors

from .evaluation import PROMPTS, ClaimRow, Evaluator, average_loras, spread
from .finetuning import BATCH, EVERY, READINGS, StyleSet, style_sets, train_loras
from .records import Records
from .sampler import as_image
from .sheets import image_grid

RANK = 8
PICTURES = 8
"""Of one style, to train on and for i2L to make the start of."""


@dataclass(frozen=True)
class Plan:
    """How much is measured: starts (keys of `STARTS`), learning rates, styles to choose these on, styles that are
    counted, the most steps of a training, and the steps without a lower loss after which it ends."""

    starts: tuple[str, ...]
    rates: tuple[float, ...]
    tuned: int
    counted: int
    steps: int
    patience: int


AFTER = 100
"""Overfitting is told so many steps after the best loss."""
NEAR = 1.02
"""A loss so many times the lowest is next to it: where a curve is flat, the step of the lowest is chance."""
SHOWN = (25, 50, 100, 200)
"""The steps at which an image is generated for the sheet."""

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""One LoRA, by module path: down [rank, d_in] and up [d_out, rank]."""


def kaiming_start(seed: int) -> Factors:
    """A fresh LoRA of most trainers: down uniform as in nn.Linear, up zero."""
    rng = torch.Generator().manual_seed(seed)
    return _fresh(lambda d_in: (2 * torch.rand(RANK, d_in, generator=rng) - 1) * d_in**-0.5)


def gaussian_start(seed: int) -> Factors:
    """A fresh LoRA of diffusers' training scripts: down normal with the standard deviation 1 / rank, up zero."""
    rng = torch.Generator().manual_seed(seed)
    return _fresh(lambda d_in: torch.randn(RANK, d_in, generator=rng) / RANK)


def _fresh(draw: Callable[[int], torch.Tensor]) -> Factors:
    shapes = {path: module.shape for path, module in MINI.i2l_modules.items()}
    return {path: (draw(d_in), torch.zeros(d_out, RANK)) for path, (d_out, d_in) in shapes.items()}


def i2l_start(lora: Lora, *, equal: bool = False) -> Factors:
    """The LoRA at the rank of the training. The rows of down are as long as those of a fresh LoRA; or as the columns of
    up where ``equal``, which is what `i2l export` writes."""
    norm = FRESH_ROWS["kaiming"]
    resized = resize(lora, RANK, row_norms=lambda path: norm(MINI.modules[path].kind.d_in, RANK), equal=equal)
    return {path: resized[path] for path in resized}


STARTS: dict[str, Callable[[Lora, int], Factors]] = {
    "random, Kaiming": lambda lora, seed: kaiming_start(seed),
    "random, Gaussian": lambda lora, seed: gaussian_start(seed),
    "i2L, Kaiming's norms": lambda lora, seed: i2l_start(lora),
    "i2L, equal norms": lambda lora, seed: i2l_start(lora, equal=True),
}
"""What a training starts from -> its factors, of the LoRA that i2L made of the pictures, and of a seed."""
EXPORTED = "i2L, equal norms"
"""The start that `i2l export` and the hooks make."""


WHOLE = Plan(tuple(STARTS), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), 3, 8, 300, 100)
QUICK = Plan(("random, Kaiming", "i2L, Kaiming's norms", EXPORTED), (1e-3, 3e-3), 1, 2, 20, 20)


@dataclass(frozen=True)
class TrainedStart:
    """One start, trained. ``tuning``: rate -> the mean lowest loss on the styles to choose by; ``rate``: the best of
    these. ``losses`` [readings, styles] at that rate, on the styles that are counted."""

    name: str
    tuning: dict[float, float]
    rate: float
    losses: torch.Tensor

    @property
    def best(self) -> torch.Tensor:
        """The lowest loss of each style [styles]."""
        return self.losses.amin(0)

    def first_at(self, goal: torch.Tensor) -> torch.Tensor:
        """The first step at which each style's loss is not above ``goal`` [styles]; infinite where there is none."""
        reached = self.losses <= goal
        return torch.where(reached.any(0), reached.int().argmax(0) * float(EVERY), torch.inf)

    def later(self) -> torch.Tensor:
        """Each style's loss `AFTER` steps after its best, or at the end, as a multiple of the best [styles]."""
        then = (self.losses.argmin(0) + AFTER // EVERY).clamp(max=len(self.losses) - 1)
        return self.losses.gather(0, then[None])[0] / self.best


@dataclass
class StartTrainings:
    """All trainings of a plan. The LoRAs that i2L makes are made once."""

    evaluator: Evaluator
    plan: Plan
    records: Records

    @cached_property
    def counted(self) -> list[StyleSet]:
        """The styles that are counted."""
        return style_sets(self.plan.counted, PICTURES, 30_000)

    @cached_property
    def tuning(self) -> list[StyleSet]:
        """The styles to choose rates on."""
        return style_sets(self.plan.tuned, PICTURES, 50_000)

    @cached_property
    def loras(self) -> dict[int, Lora]:
        """What i2L makes of a set's pictures, by the set's seed."""
        return {
            one.seed: average_loras(self.evaluator.make_loras("mini", one.pictures))
            for one in (*self.tuning, *self.counted)
        }

    def trained(self) -> list[TrainedStart]:
        """Every start of the plan at its best rate."""
        found = []
        for name in self.plan.starts:
            rate, by_rate = self.tuned_rate(name)
            found.append(TrainedStart(name, by_rate, rate, self._losses(name, self.counted, rate)))
        return found

    def tuned_rate(self, name: str) -> tuple[float, dict[float, float]]:
        """The best rate for the start of this name, and the mean lowest loss by rate."""
        by_rate = {rate: self._losses(name, self.tuning, rate).amin(0).mean().item() for rate in self.plan.rates}
        return min(by_rate, key=lambda rate: by_rate[rate]), by_rate

    def starts(self, name: str, sets: Sequence[StyleSet]) -> LoraFactors:
        """The start of this name, a key of `STARTS`, for each set."""
        return stacked([STARTS[name](self.loras[one.seed], one.seed) for one in sets])

    def _losses(self, name: str, sets: Sequence[StyleSet], rate: float) -> torch.Tensor:
        """The held-out losses [readings, styles] of trainings from the start of this name."""
        plan = self.plan

        def measure() -> list[list[float]]:
            base, starts = self.evaluator.sampler.base, self.starts(name, sets)
            return train_loras(base, starts, sets, rate, plan.steps, patience=plan.patience).losses.tolist()

        conditions = conditions_of(self.evaluator, name, sets, rate, [plan.steps, plan.patience])
        return torch.tensor(self.records.get(conditions, measure))


def conditions_of(
    evaluator: Evaluator, name: str, sets: Sequence[StyleSet], rate: float, plan: Sequence[int]
) -> dict[str, object]:
    """What the result of trainings depends on, for `Records`."""
    return {
        "weights": evaluator.digest, "start": name, "styles": [one.seed for one in sets], "rate": rate,
        "plan": list(plan), "rank": RANK, "pictures": len(sets[0].pictures), "batch": BATCH, "every": EVERY,
        "readings": READINGS,
    }  # fmt: skip


def stacked(loras: Sequence[Factors]) -> LoraFactors:
    """Several LoRAs side by side."""
    return {
        path: (torch.stack([own[path][0] for own in loras]), torch.stack([own[path][1] for own in loras]))
        for path in loras[0]
    }


def start_rows(starts: Sequence[TrainedStart], plan: Plan) -> list[ClaimRow]:
    """The claim, its figures by start, and what each rate came to. The better of the random starts and the better of
    i2L's, by the styles that are not counted, stand for their kinds."""
    ours, fresh = chosen_starts(starts)
    styles = f"{plan.counted} styles, {PICTURES} pictures each"
    ratio = ours.best / fresh.best
    own, other = ours.first_at(fresh.best), fresh.first_at(fresh.best)
    share = own.clamp(max=float(plan.steps)).mean() / other.mean()
    near, fresh_near = ours.first_at(NEAR * fresh.best), fresh.first_at(NEAR * fresh.best)
    near_share = near.clamp(max=float(plan.steps)).mean() / fresh_near.mean()
    return [
        ClaimRow(
            "start", "i2L as the start of a LoRA training",
            f"lowest held-out loss, each start at its own best rate: {ours.name} / {fresh.name}", "< 1",
            f"{ratio.mean():.3f} ± {ratio.std():.3f} ({spread(ours.best)} / {spread(fresh.best)}; lower for "
            f"{int((ratio < 1).sum())} styles); before any step {spread(ours.losses[0])}",
            ratio.mean().item() < 1, styles,
        ),
        ClaimRow(
            "start", "... it converges earlier",
            "steps to the random start's lowest held-out loss, as a share of the random start's own", "<= 1/3",
            f"{share:.3f} (steps {_steps(own)} against {_steps(other)})", share.item() <= 1 / 3, styles, NOTE,
        ),
        ClaimRow(
            "start", "(for reference)", f"the same to {NEAR:g} times that loss", "none",
            f"{near_share:.3f} (steps {_steps(near)} against {_steps(fresh_near)})", None, styles,
        ),
        *(_reference(start, plan, styles) for start in starts),
    ]  # fmt: skip


NOTE = "at its own best rate a random start is quick on eight pictures of mini, so a third of few steps is few."


def chosen_starts(starts: Sequence[TrainedStart]) -> tuple[TrainedStart, TrainedStart]:
    """The best start of i2L and the best random one, by the styles that are not counted."""
    best = sorted(starts, key=lambda start: min(start.tuning.values()))
    ours, fresh = (next(start for start in best if start.name.startswith(kind)) for kind in ("i2L", "random"))
    return ours, fresh


def _reference(start: TrainedStart, plan: Plan, styles: str) -> ClaimRow:
    tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in start.tuning.items())
    return ClaimRow(
        "start", f"(for reference) {start.name}{' (as exported)' * (start.name == EXPORTED)}, rate {start.rate:g}",
        f"lowest held-out loss; its step; the loss {AFTER} steps later, as a multiple; lowest loss by rate on "
        f"{plan.tuned} other styles", "none",
        f"{start.best.mean():.4f} ± {start.best.std():.4f}; {spread(start.first_at(start.best), 0)}; "
        f"{spread(start.later(), 2)}; {tried}", None, styles,
    )  # fmt: skip


def _steps(steps: torch.Tensor) -> str:
    return ", ".join(f"{step:.0f}" if step.isfinite() else "never" for step in steps)


def plot_starts(starts: Sequence[TrainedStart]) -> Image.Image:
    """Held-out loss over steps, each start at its own rate: a thin line for each style, a thick one for their mean.
    Beside it the lowest loss by rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    curves, rates = figure.subplots(1, 2)
    for number, start in enumerate(starts):
        colour = f"C{number}"
        steps = range(0, len(start.losses) * EVERY, EVERY)
        for line in start.losses.T:
            curves.plot(steps, line, color=colour, linewidth=0.5, alpha=0.4)
        curves.plot(steps, start.losses.mean(1), color=colour, linewidth=2, label=f"{start.name}, {start.rate:g}")
        rates.plot(list(start.tuning), list(start.tuning.values()), color=colour, marker="o", label=start.name)
    curves.set(title="held-out loss, each at its best rate", xlabel="step", ylabel="loss", yscale="log")
    rates.set(title="lowest held-out loss, other styles", xlabel="learning rate", ylabel="loss")
    rates.loglog()
    for axes in (curves, rates):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return Image.open(stream).convert("RGB")


def start_sheet(trainings: StartTrainings, starts: Sequence[TrainedStart]) -> Image.Image:
    """Images on the way of two trainings, from the best random start (above) and the best of i2L."""
    evaluator, sets, rows = trainings.evaluator, trainings.counted[:1], []
    for start in reversed(chosen_starts(starts)):
        factors = trainings.starts(start.name, sets)
        trained = train_loras(evaluator.sampler.base, factors, sets, start.rate, SHOWN[-1], keep=(0, *SHOWN))
        loras = [lora for found in trained.factors.values() for lora in loras_of(found)]
        images = [evaluator.generate(PROMPTS[:1], lora) for lora in loras]
        rows.append([sets[0].pictures[0].image, *(as_image(image[0]) for image in images)])
    return image_grid(rows, ["reference", *(f"{step} steps" for step in (0, *SHOWN))], 96)


def loras_of(factors: LoraFactors) -> list[Lora]:
    """Factors of N LoRAs, one by one."""
    count = len(next(iter(factors.values()))[0])
    return [Lora.of(MINI, {path: (a[n], b[n]) for path, (a, b) in factors.items()}) for n in range(count)]
