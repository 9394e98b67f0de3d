"""The authors' claims, each as a measurement on pictures never seen in training. Nothing here decides a verdict but
the bound that stands in the row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from PIL import Image

from i2l_ext.converters.lora import Lora
from i2l_ext.mini import measures, start, world
from i2l_ext.mini.draw import as_image, sheet
from i2l_ext.mini.evaluation import PROMPTS, SILENT, Lab, Sample, mean_of, unseen
from i2l_ext.mini.start import Run
from i2l_ext.training.config import Expert, Schedule

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Row:
    """A line of the table. ``holds`` is None for a figure without a bound.

    ``note``: why a bound that does not hold cannot be shown in miniature. ``guard``: whether the figure is at least
    as good as it is known to be, for such a row.
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
        """Worse than it should be: CI fails."""
        return not self.guard or (self.holds is False and not self.note)


@dataclass
class Trials:
    """All trials over one set of samples; what several of them need is drawn once."""

    lab: Lab
    quick: bool = False
    pictures: dict[str, Image.Image] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return 16 if self.quick else 48

    @cached_property
    def samples(self) -> list[Sample]:
        return [group[0] for group in unseen(self.size, 1)]

    @cached_property
    def style_loras(self) -> list[Lora]:
        return self.lab.loras("mini", self.samples)

    @cached_property
    def without(self) -> torch.Tensor:
        """The base's own drawings, one a prompt, the same for every sample: [8, 3, 32, 32]."""
        return self.lab.draw(PROMPTS)

    @cached_property
    def by_weight(self) -> dict[float, torch.Tensor]:
        """Drawings with each sample's LoRA: weight -> [samples, 8, 3, 32, 32]."""
        return {
            weight: torch.stack([self.lab.draw(PROMPTS, lora, weight) for lora in self.style_loras])
            for weight in WEIGHTS
        }

    def run(self, only: Sequence[str] = ()) -> list[Row]:
        """Every trial's rows in the order of the table, or those of the trials named."""
        return [row for name, trial in TRIALS.items() if not only or name in only for row in trial(self)]

    def style(self) -> list[Row]:
        with_it = _distances(measures.style_distance, self.by_weight[1.0], self.samples)
        without = _distances(measures.style_distance, self.by_weight[0.0], self.samples)
        colour = _distances(measures.colour_distance, self.by_weight[1.0], self.samples)
        colour_without = _distances(measures.colour_distance, self.by_weight[0.0], self.samples)
        floor = self._floor()
        shown = list(range(min(8, len(self.samples))))
        self.pictures["style"] = sheet(
            [
                [self.samples[n].image, *(as_image(self.by_weight[w][n, n % 8]) for w in WEIGHTS)]
                for n in shown
            ],
            ["reference", "without", *(f"weight {w:g}" for w in WEIGHTS[1:])],
            96,
        )  # fmt: skip
        ratio = (with_it.mean() / without.mean()).item()
        return [
            Row(
                "style", "Style: one picture gives its style",
                "style distance of drawings to the reference, with LoRA / without", "<= 0.2",
                f"{ratio:.3f} ({_spread(with_it)} / {_spread(without)})", ratio <= 0.2, self._n("x 8 prompts"),
                note=NOTES["style"], guard=ratio <= 0.3,
            ),
            Row(
                "style", "(for reference)", "the same, drawn by the world itself: same style, other content", "none",
                f"{floor.mean() / without.mean():.3f} ({_spread(floor)})", None, self._n(""),
            ),
            Row(
                "style", "(for reference)", "colour half of the distance alone, with / without", "none",
                f"{colour.mean() / colour_without.mean():.3f} ({_spread(colour)} / {_spread(colour_without)})",
                None, self._n("x 8 prompts"),
            ),
        ]  # fmt: skip

    def _floor(self) -> torch.Tensor:
        """How far the world's own pictures of the prompted shapes, in the reference's style, are from it."""
        rows = []
        for sample in self.samples:
            group = [Sample.of(sample.style, world.Content(shape, "", 0.5, 0.5, 0.26)).small for shape in world.SHAPES]
            rows.append(torch.stack(group))
        return _distances(measures.style_distance, torch.stack(rows), self.samples)

    def content(self) -> list[Row]:
        repeats = 4 if self.quick else 24
        base = torch.stack([self.lab.draw(PROMPTS, seed=8 * n) for n in range(repeats)])
        own, styled = self._accuracy(base), self._accuracy(self.by_weight[1.0])
        return [
            Row(
                "content", "... to any content", "prompted shape judged right, with LoRA / by the base alone", ">= 0.9",
                f"{styled / own:.3f} ({styled:.3f} / {own:.3f})", styled / own >= 0.9, self._n("x 8 prompts"),
            )
        ]  # fmt: skip

    def _accuracy(self, drawings: torch.Tensor) -> float:
        """Share of drawings [..., 8, 3, 32, 32], one a shape in the order of the prompts, judged as prompted."""
        judged = self.lab.judge(drawings.flatten(0, -4)).argmax(1)
        asked = torch.arange(len(world.SHAPES)).repeat(len(judged) // len(world.SHAPES))
        return (judged == asked).float().mean().item()

    def strength(self) -> list[Row]:
        prompts = PROMPTS * 2  # noise of the drawings is no matter of the weight
        least = 0.85 if self.quick else 0.95  # one of the quick sixteen is 6 %
        curves = torch.stack(
            [
                _distances(
                    measures.style_distance,
                    torch.stack([self.lab.draw(prompts, lora, weight) for lora in self.style_loras]),
                    self.samples,
                )
                for weight in WEIGHTS
            ]
        )
        down = curves.diff(dim=0) < 0
        falls, each = down.all(0).float().mean().item(), down.float().mean(1)
        means = ", ".join(f"{value:.3f}" for value in curves.mean(1).tolist())
        return [
            Row(
                "strength", "strength", "style distance falls at each of the weights 0, 0.25, 0.5, 0.75, 1",
                "for >= 95 % of the pictures", f"{falls:.1%} (means {means}; falls at each step for "
                f"{_shares(each)})", falls >= least, self._n(f"x 8 prompts x {len(prompts) // 8} seeds"),
            )
        ]  # fmt: skip

    def several(self) -> list[Row]:
        groups = unseen(self.size // 2, 5, offset=10_000)
        one, four = [], []
        loras = self.lab.loras("mini", [sample for group in groups for sample in group[:4]])
        for n, group in enumerate(groups):
            own, target = loras[4 * n : 4 * n + 4], [group[4]]
            one.append(_distances(measures.style_distance, self.lab.draw(PROMPTS, own[0])[None], target))
            four.append(_distances(measures.style_distance, self.lab.draw(PROMPTS, mean_of(own))[None], target))
        single, joint = torch.cat(one), torch.cat(four)
        return [
            Row(
                "several", "several pictures of one style: average",
                "mean style distance to a fifth picture: 4 pictures against 1", "4 <= 1",
                f"{_spread(joint)} against {_spread(single)}", bool(joint.mean() <= single.mean()),
                f"{len(groups)} styles x 8 prompts",
            )
        ]  # fmt: skip

    @cached_property
    def detailed(self) -> dict[str, list[Lora]]:
        names = ("mini-coarse", "mini-coarse-fine", "mini-coarse-fine-bias")
        return {name: self.lab.loras(name, self.samples) for name in names} | {"mini": self.style_loras}

    @cached_property
    def silent(self) -> dict[str, torch.Tensor]:
        """Drawings of the caption that says nothing, four seeds each: model -> [samples, 4, 3, 32, 32]."""
        names = ("mini", "mini-coarse", "mini-coarse-fine")
        return {
            name: torch.stack([self.lab.draw([SILENT] * 4, lora) for lora in self.detailed[name]]) for name in names
        }

    @cached_property
    def prompted(self) -> dict[str, torch.Tensor]:
        """Drawings of the eight prompts: model -> [samples, 8, 3, 32, 32]."""
        names = ("mini-coarse", "mini-coarse-fine", "mini-coarse-fine-bias")
        drawn = {name: torch.stack([self.lab.draw(PROMPTS, lora) for lora in self.detailed[name]]) for name in names}
        return drawn | {"mini": self.by_weight[1.0]}

    def coarse(self) -> list[Row]:
        kept, accuracy, distance = {}, {}, {}
        shapes = [sample.content.shape for sample in self.samples for _ in range(4)]
        for name in ("mini", "mini-coarse", "mini-coarse-fine"):
            judged = self.lab.judge.shapes(self.silent[name].flatten(0, 1))
            kept[name] = sum(a == b for a, b in zip(judged, shapes, strict=True)) / len(shapes)
            accuracy[name] = self._accuracy(self.prompted[name])
            distance[name] = _distances(measures.style_distance, self.prompted[name], self.samples)
        self.pictures["detail"] = sheet(
            [
                [self.samples[n].image, *(as_image(self.silent[name][n, 0]) for name in kept),
                 *(as_image(self.prompted[name][n, 3]) for name in ("mini", "mini-coarse"))]
                for n in range(min(8, len(self.samples)))
            ],
            ["reference", "Style", "Coarse", "Coarse+Fine", "'a star', Style", "'a star', Coarse"],
            96,
        )  # fmt: skip
        means = {name: value.mean().item() for name, value in distance.items()}
        return [
            Row(
                "coarse", "Coarse keeps more content than Style", "reference's shape judged, prompt 'a picture'",
                "Coarse > Style", f"{kept['mini-coarse']:.3f} > {kept['mini']:.3f}",
                kept["mini-coarse"] > kept["mini"], self._n("x 4 seeds"),
            ),
            Row(
                "coarse", "... at the price of semantic invasion", "prompted shape judged right, Style / Coarse",
                "report",
                f"{accuracy['mini']:.3f} / {accuracy['mini-coarse']:.3f}", None, self._n("x 8 prompts"),
            ),
            Row(
                "coarse", "... and of style", "style distance under the prompts, Style / Coarse", "report",
                f"{means['mini']:.3f} / {means['mini-coarse']:.3f}", None, self._n("x 8 prompts"),
            ),
        ]  # fmt: skip

    def fine(self) -> list[Row]:
        target = torch.stack([sample.small for sample in self.samples])[:, None]
        error = {name: (self.silent[name] - target).square().mean((1, 2, 3, 4)).sqrt() for name in self.silent}
        coarse, fine = error["mini-coarse"], error["mini-coarse-fine"]
        return [
            Row(
                "fine", "Fine on top of Coarse keeps more detail", "RMS error of the reference, prompt 'a picture'",
                "Coarse + Fine < Coarse", f"{_spread(fine)} < {_spread(coarse)}, by {(coarse - fine).mean():.4f}, "
                f"smaller for {(fine < coarse).float().mean():.0%} of the pictures (Style: {error['mini'].mean():.3f})",
                bool(fine.mean() < coarse.mean()), self._n("x 4 seeds"),
            )
        ]  # fmt: skip

    def bias(self) -> list[Row]:
        own = torch.cat([self.lab.draw(PROMPTS, seed=8 * n) for n in range(self.size)])
        distance = {
            name: measures.set_distance(self.prompted[name].flatten(0, 1), own)
            for name in ("mini-coarse-fine", "mini-coarse-fine-bias")
        }
        without, with_it = distance.values()
        return [
            Row(
                "bias", "Bias brings drawings back to the base's own distribution",
                "distance of all drawings' statistics to the base's, with Bias / without", "with < without",
                f"{with_it:.3f} < {without:.3f}", with_it < without, self._n("x 8 prompts"),
            )
        ]  # fmt: skip

    def start(self) -> list[Row]:
        seeds = {start.RATES[0]: 1} if self.quick else dict(zip(start.RATES, (5, 2), strict=True))
        by_rate = {
            rate: [start.compare(self.lab, seed, rate, not self.quick and seed == 0) for seed in range(count)]
            for rate, count in seeds.items()
        }
        if not self.quick:
            runs = by_rate[start.RATES[0]]
            self.pictures["start"] = start.curves(runs)
            self.pictures["start-pictures"] = start.table(runs[0])
        return [self._started(rate, runs, main=rate == start.RATES[0]) for rate, runs in by_rate.items()]

    def _started(self, rate: float, runs: Sequence[Run], main: bool) -> Row:
        reached = [[run.reached(which) for run in runs] for which in (0, 1)]
        share = sum(reached[0]) / len(runs) / start.STEPS
        return Row(
            "start", "i2L as the start of a LoRA training" if main else "(for reference) at another learning rate",
            f"steps to the loss that a random start has after {start.STEPS}, share of {start.STEPS}; rate {rate:g}",
            "<= 1/3" if main else "none",
            f"{share:.3f} (steps: {_list(reached[0])}; on held-out pictures: {_list(reached[1])}); the "
            f"random start is where i2L begins after {_list([run.worth(0) for run in runs])} steps",
            share <= 1 / 3 if main else None, f"{len(runs)} styles, 8 pictures each",
        )  # fmt: skip

    def apart(self) -> list[Row]:
        groups = unseen(self.size // 2, 2, offset=20_000)
        loras = self.lab.loras("mini", [sample for group in groups for sample in group])
        deltas = torch.stack([torch.cat([lora.delta(path).flatten() for path in lora]) for lora in loras])
        cosines = torch.nn.functional.normalize(deltas) @ torch.nn.functional.normalize(deltas).T
        style = torch.arange(len(loras)) // 2
        same = (style[:, None] == style) & ~torch.eye(len(loras), dtype=torch.bool)
        different = style[:, None] != style
        a, b = cosines[same], cosines[different]
        order = (a[:, None] > b[None, torch.linspace(0, len(b) - 1, min(len(b), 4096)).long()]).float().mean().item()
        own = torch.nn.functional.normalize(deltas - deltas.mean(0))
        centred = own @ own.T
        return [
            Row(
                "apart", "two different styles give different LoRAs",
                "cosine between LoRAs, same style (other content) / different styles; share of cases in which the "
                "former is greater; the same with the mean LoRA taken off", "greater in >= 90 %",
                f"{_spread(a)} / {_spread(b)}; {order:.1%}; {_spread(centred[same])} / {_spread(centred[different])}",
                order >= 0.9, f"{len(groups)} styles x 2 pictures",
            )
        ]  # fmt: skip

    def kinds(self) -> list[Row]:
        """The kind of head that measured worse: trained by the same command, but not shipped."""
        path = self.lab.folder / "style.safetensors"
        if not path.exists():
            return []
        loras = start.other_loras(self.lab, path, self.samples, OTHER)
        drawn = torch.stack([self.lab.draw(PROMPTS, lora) for lora in loras])
        distance = _distances(measures.style_distance, drawn, self.samples)
        own = _distances(measures.style_distance, self.by_weight[1.0], self.samples)
        return [
            Row(
                "kinds", "(choice of heads)",
                "style distance at equal parameters and steps: core kind, rank 32 (shipped) / published kind, rank 4",
                "none",
                f"{_spread(own)} / {_spread(distance)}; shape accuracy {self._accuracy(self.by_weight[1.0]):.3f} / "
                f"{self._accuracy(drawn):.3f}", None, self._n("x 8 prompts"),
            )
        ]  # fmt: skip

    def _n(self, what: str) -> str:
        return f"{len(self.samples)} pictures {what}".strip()


NOTES = {
    "style": "the colours alone are well within the bound, the distance as a whole is not: textures and outlines of "
    "two pixels. A LoRA trained in the ordinary way on this base (300 steps, 128 pictures of a style, 4 styles) came "
    "to a distance of 0.295, no nearer: what is missing is in the base as much as in the heads. CI guards 0.3.",
}
OTHER = Expert("style", Schedule(0), compress=32)
TRIALS: dict[str, Callable[[Trials], list[Row]]] = {
    name: getattr(Trials, name)
    for name in ("style", "content", "strength", "several", "coarse", "fine", "bias", "start", "apart", "kinds")
}


def _distances(
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], drawings: torch.Tensor, samples: Sequence[Sample]
) -> torch.Tensor:
    """Mean distance of each sample's drawings [samples, P, 3, 32, 32] to it: [samples]."""
    count = drawings.shape[1]
    targets = torch.stack([sample.small for sample in samples]).repeat_interleave(count, 0)
    return measure(drawings.flatten(0, 1), targets).view(-1, count).mean(1)


def _shares(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.0%}" for value in values.tolist())


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _spread(values: torch.Tensor) -> str:
    return f"{values.mean():.3f} ± {values.std():.3f}"
