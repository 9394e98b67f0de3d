"""How near the LoRA of i2L comes to one that was trained on the same pictures, how much of what a picture shows gets
into its LoRA, and what several pictures bring."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from i2l_ext.converters.lora import Lora
from i2l_ext.models import catalogue

from .evaluation import PROMPTED, PROMPTS, ClaimRow, Evaluator, UnseenPicture, average_loras, spread, style_distances
from .finetuning import StyleSet, style_sets, train_loras
from .records import Records
from .start_claims import PICTURES, StartTrainings, conditions_of, kaiming_start, loras_of, stacked
from .things import THINGS

NUMBERS = (1, 2, 4, 8)
"""How many pictures one LoRA is made of."""
STEPS = (50, 200, 1000)
"""Steps of the trainings that i2L is compared with."""
QUICK_STEPS = (10, 20)


@dataclass(frozen=True)
class LoraFigures:
    """What LoRAs do in each of N styles: ``distance`` of the images to a further picture of the style, share of images
    that show the ``prompted`` thing, and share of those under other shapes' prompts that show one of the pictures that
    the LoRA was made of (``leaked``)."""

    distance: torch.Tensor
    prompted: torch.Tensor
    leaked: torch.Tensor

    def words(self, other: LoraFigures | None = None) -> str:
        """For a table: distance, prompted, and for how many styles the distance is less than ``other``'s."""
        nearer = f"; {int((self.distance < other.distance).sum())} of {len(self.distance)}" if other else ""
        return f"{spread(self.distance)}; {spread(self.prompted)}{nearer}"


def lora_figures(evaluator: Evaluator, loras: Sequence[Lora | None], sets: Sequence[StyleSet]) -> LoraFigures:
    """Of images of the eight prompts with each set's LoRA, or by the base alone for None."""
    images = torch.stack([evaluator.generate(PROMPTS, lora) for lora in loras])
    shown = evaluator.classifier(images.flatten(0, 1)).argmax(1).view(len(sets), -1)
    prompted = (shown == torch.arange(len(PROMPTED))).float().mean(1)
    own = torch.tensor([[any(p.content.thing == s for p in one.pictures) for s in THINGS] for one in sets])
    others = ~own[:, : len(PROMPTED)]
    leaked = (own.gather(1, shown) & others).float().sum(1) / others.sum(1)
    return LoraFigures(style_distances(images, [one.held_out[0] for one in sets]), prompted, leaked)


def trained_figures(
    evaluator: Evaluator, sets: Sequence[StyleSet], rate: float, steps: Sequence[int], records: Records
) -> dict[int, LoraFigures]:
    """Of LoRAs that are trained on each set from a random start: after how many steps -> figures."""

    def measure() -> list[list[list[float]]]:
        starts = stacked([kaiming_start(one.seed) for one in sets])
        trained = train_loras(evaluator.sampler.base, starts, sets, rate, max(steps), keep=steps)
        found = [lora_figures(evaluator, loras_of(trained.factors[step]), sets) for step in steps]
        return [[part.distance.tolist(), part.prompted.tolist(), part.leaked.tolist()] for part in found]

    conditions = conditions_of(evaluator, "trained", sets, rate, list(steps))
    found = records.get(conditions, measure)
    return {step: LoraFigures(*map(torch.tensor, part)) for step, part in zip(steps, found, strict=True)}


def averaged(evaluator: Evaluator, sets: Sequence[StyleSet], number: int) -> list[Lora]:
    """A LoRA of each set's first pictures, as `i2l make` makes it of several."""
    made = evaluator.make_loras("mini", [picture for one in sets for picture in one.pictures[:number]])
    return [average_loras(made[n : n + number]) for n in range(0, len(made), number)]


def together(evaluator: Evaluator, sets: Sequence[StyleSet], number: int) -> list[Lora]:
    """A LoRA of each set's first pictures by the model that sees them together."""
    return [evaluator.make_lora_together("mini-queries", one.pictures[:number]) for one in sets]


def number_rows(evaluator: Evaluator, quick: bool) -> list[ClaimRow]:
    """One picture against several: LoRAs averaged, and tokens seen together."""
    sets = style_sets(4 if quick else 24, max(NUMBERS), 60_000)
    rows = []
    for how, make in (("averaged (mini)", averaged), ("seen together (mini-queries)", together)):
        found = [lora_figures(evaluator, make(evaluator, sets, number), sets) for number in NUMBERS]
        rows += [
            ClaimRow(
                "number", f"a LoRA of {number} picture{'s' * (number > 1)} of a style, {how}",
                "style distance to a further picture; prompted thing recognised; styles nearer than with one picture",
                "none", part.words(found[0] if number > 1 else None), None, f"{len(sets)} styles x 8 prompts",
            )
            for number, part in zip(NUMBERS, found, strict=True)
        ]  # fmt: skip
    return rows


def trained_rows(trainings: StartTrainings, quick: bool) -> list[ClaimRow]:
    """The LoRA of i2L against one trained on the same pictures."""
    evaluator, sets, steps = trainings.evaluator, trainings.counted, QUICK_STEPS if quick else STEPS
    rate = trainings.tuned_rate("random, Kaiming")[0]
    ours = lora_figures(evaluator, averaged(evaluator, sets, PICTURES), sets)
    trained = trained_figures(evaluator, sets, rate, steps, trainings.records)
    found = {"i2L, no training": ours, **{f"trained for {step} steps, rate {rate:g}": trained[step] for step in steps}}
    return [
        ClaimRow(
            "trained", f"a LoRA of {PICTURES} pictures: {name}",
            "style distance to a further picture; prompted thing recognised; styles nearer than with i2L", "none",
            part.words(None if part is ours else ours), None, f"{len(sets)} styles x 8 prompts",
        )
        for name, part in found.items()
    ]  # fmt: skip


def leakage_rows(trainings: StartTrainings, quick: bool) -> list[ClaimRow]:
    """How often the one picture's thing is drawn where another was asked for."""
    evaluator, steps = trainings.evaluator, QUICK_STEPS if quick else STEPS[:2]
    sets = style_sets(trainings.plan.counted, 1, 70_000)
    rate = trainings.tuned_rate("random, Kaiming")[0]
    found = {
        "the base alone": lora_figures(evaluator, [None] * len(sets), sets),
        "i2L Style (learnt from pairs of other contents)": lora_figures(evaluator, averaged(evaluator, sets, 1), sets),
        "i2L Coarse (learnt from the picture itself)": lora_figures(
            evaluator, evaluator.make_loras("mini-coarse", [one.pictures[0] for one in sets]), sets
        ),
    }
    trained = trained_figures(evaluator, sets, rate, steps, trainings.records)
    found |= {f"trained for {step} steps, rate {rate:g}": trained[step] for step in steps}
    return [
        ClaimRow(
            "leakage", f"what one picture shows, in images of other prompts: {name}",
            "the picture's thing recognised where another was prompted; style distance; prompted thing recognised",
            "none", f"{spread(part.leaked)}; {part.words()}", None, f"{len(sets)} pictures x 8 prompts",
        )
        for name, part in found.items()
    ]  # fmt: skip


PREDICTORS = {"mini": "heads (core kind)", "mini-queries": "queries"}
"""By the name of a model, in words."""


def predictor_rows(evaluator: Evaluator, pictures: Sequence[UnseenPicture]) -> list[ClaimRow]:
    """The predictor of the later paper beside the heads of `mini`, at equal parameters and steps."""
    rows = []
    for name, words in PREDICTORS.items():
        model, start = catalogue.find(name), time.perf_counter()
        loras = evaluator.make_loras(name, pictures)
        seconds = (time.perf_counter() - start) / len(pictures)
        images = torch.stack([evaluator.generate(PROMPTS, lora) for lora in loras])
        size = 2 * sum(factor.numel() for path in loras[0] for factor in loras[0][path])
        several = "the same" if model.sees_together else "times their number"
        rows.append(
            ClaimRow(
                "kinds", f"which predictor: {words}",
                "style distance; prompted thing recognised; rank, of several pictures; bytes of a LoRA; seconds a "
                "picture, here; parameters", "none",
                f"{spread(style_distances(images, pictures))}; {evaluator.accuracy(images):.3f}; {model.rank}, "
                f"{several}; {size:,}; {seconds:.2f}; {sum(one.heads.parameters for one in model.experts):,}", None,
                f"{len(pictures)} pictures x 8 prompts",
            )
        )  # fmt: skip
    return rows
