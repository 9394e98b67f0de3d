"""The authors' claims, each measured on pictures that were not in the training data. Whether a claim holds depends
only on the bound in its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from i2l_ext.converters.lora import Lora

from . import measures, picture_claims, start_claims, world
from .branch_claims import SCALES, grey_lora, images_by_branch
from .evaluation import (
    NEUTRAL_PROMPT,
    PROMPTS,
    ClaimRow,
    Evaluator,
    UnseenPicture,
    average_loras,
    pixels_of,
    spread,
    style_distances,
    unseen_pictures,
)
from .records import Records
from .sampler import as_image
from .sheets import image_grid
from .start_claims import QUICK, WHOLE, StartTrainings

LORA_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class ClaimMeasurements:
    """All measurements, on one set of unseen pictures. What several of them need is generated once.

    ``quick`` takes a smaller set. ``records`` hold what the long measurements found so far. ``sheets`` are the images
    that belong to the claims measured so far, by name.
    """

    evaluator: Evaluator
    quick: bool = False
    records: Records = field(default_factory=Records)
    sheets: dict[str, Image.Image] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many pictures there are."""
        return 16 if self.quick else 48

    @cached_property
    def pictures(self) -> list[UnseenPicture]:
        """One of each of ``size`` styles."""
        return [group[0] for group in unseen_pictures(self.size, 1)]

    @cached_property
    def style_loras(self) -> list[Lora]:
        """The Style LoRA of each picture."""
        return self.evaluator.make_loras("mini", self.pictures)

    @cached_property
    def images_by_weight(self) -> dict[float, torch.Tensor]:
        """Images of the eight prompts with each Style LoRA: LoRA weight -> [pictures, 8, 3, 32, 32]."""
        return {weight: self._generate(PROMPTS, self.style_loras, weight) for weight in LORA_WEIGHTS}

    @cached_property
    def loras_by_model(self) -> dict[str, list[Lora]]:
        """A LoRA of each picture: model -> LoRAs."""
        names = ("mini-coarse", "mini-coarse-fine", "mini-coarse-fine-bias")
        return {name: self.evaluator.make_loras(name, self.pictures) for name in names} | {"mini": self.style_loras}

    @cached_property
    def neutral_images(self) -> dict[str, torch.Tensor]:
        """Images of the neutral prompt, with four seeds: model -> [pictures, 4, 3, 32, 32]."""
        names = ("mini", "mini-coarse", "mini-coarse-fine")
        return {name: self._generate([NEUTRAL_PROMPT] * 4, self.loras_by_model[name]) for name in names}

    @cached_property
    def prompted_images(self) -> dict[str, torch.Tensor]:
        """Images of the eight prompts: model -> [pictures, 8, 3, 32, 32]."""
        names = ("mini-coarse", "mini-coarse-fine", "mini-coarse-fine-bias")
        generated = {name: self._generate(PROMPTS, self.loras_by_model[name]) for name in names}
        return generated | {"mini": self.images_by_weight[1.0]}

    def _generate(self, prompts: Sequence[str], loras: Sequence[Lora], weight: float = 1.0) -> torch.Tensor:
        """Images of P prompts with each of N LoRAs: [N, P, 3, 32, 32]."""
        if not weight:  # the same for all
            return self.evaluator.generate(prompts).expand(len(loras), -1, -1, -1, -1)
        return torch.stack([self.evaluator.generate(prompts, lora, weight) for lora in loras])

    def rows(self, name: str) -> list[ClaimRow]:
        """The rows of the claim with this name, a key of `CLAIMS`."""
        return CLAIMS[name](self)

    def style(self) -> list[ClaimRow]:
        with_it = style_distances(self.images_by_weight[1.0], self.pictures)
        without = style_distances(self.images_by_weight[0.0], self.pictures)
        colour = _colour_distances(self.images_by_weight[1.0], self.pictures)
        colour_without = _colour_distances(self.images_by_weight[0.0], self.pictures)
        floor = self._floor()
        shown = list(range(min(8, len(self.pictures))))
        self.sheets["style"] = image_grid(
            [
                [self.pictures[n].image, *(as_image(self.images_by_weight[w][n, n % 8]) for w in LORA_WEIGHTS)]
                for n in shown
            ],
            ["reference", "without", *(f"weight {w:g}" for w in LORA_WEIGHTS[1:])],
            96,
        )  # fmt: skip
        ratio = (with_it.mean() / without.mean()).item()
        return [
            ClaimRow(
                "style", "Style: one picture gives its style",
                "style distance of images to the reference, with LoRA / without", "<= 0.2",
                f"{ratio:.3f} ({spread(with_it)} / {spread(without)})", ratio <= 0.2, self._count("x 8 prompts"),
                note=NOTES["style"], guard=ratio <= 0.3,
            ),
            ClaimRow(
                "style", "(for reference)", "the same for the world's own pictures: same style, other content", "none",
                f"{floor.mean() / without.mean():.3f} ({spread(floor)})", None, self._count(""),
            ),
            ClaimRow(
                "style", "(for reference)", "colour half of the distance alone, with / without", "none",
                f"{colour.mean() / colour_without.mean():.3f} ({spread(colour)} / {spread(colour_without)})",
                None, self._count("x 8 prompts"),
            ),
        ]  # fmt: skip

    def _floor(self) -> torch.Tensor:
        """The style distance of the world's own pictures of the prompted shapes, in each picture's style, to it."""
        contents = [world.Content(shape, "", 0.5, 0.5, 0.26) for shape in world.SHAPES]
        rows = [
            torch.stack([UnseenPicture.of(picture.style, content).pixels for content in contents])
            for picture in self.pictures
        ]
        return style_distances(torch.stack(rows), self.pictures)

    def content(self) -> list[ClaimRow]:
        repeats = 4 if self.quick else 24
        base = torch.stack([self.evaluator.generate(PROMPTS, seed=8 * n) for n in range(repeats)])
        own, styled = self._accuracy(base), self._accuracy(self.images_by_weight[1.0])
        return [
            ClaimRow(
                "content", "... to any content", "prompted shape recognised, with LoRA / by the base alone", ">= 0.9",
                f"{styled / own:.3f} ({styled:.3f} / {own:.3f})", styled / own >= 0.9, self._count("x 8 prompts"),
            )
        ]  # fmt: skip

    def _accuracy(self, images: torch.Tensor) -> float:
        """Share of images [..., 8, 3, 32, 32], one for each prompt, that show the prompted shape."""
        shown = self.evaluator.classifier(images.flatten(0, -4)).argmax(1)
        prompted = torch.arange(len(world.SHAPES)).repeat(len(shown) // len(world.SHAPES))
        return (shown == prompted).float().mean().item()

    def strength(self) -> list[ClaimRow]:
        prompts = PROMPTS * 2  # two seeds: less of the difference is chance
        least = 0.85 if self.quick else 0.95  # one of the quick sixteen is 6 %
        curves = torch.stack(
            [
                style_distances(self._generate(prompts, self.style_loras, weight), self.pictures)
                for weight in LORA_WEIGHTS
            ]
        )
        down = curves.diff(dim=0) < 0
        falls, each = down.all(0).float().mean().item(), down.float().mean(1)
        means = ", ".join(f"{value:.3f}" for value in curves.mean(1).tolist())
        return [
            ClaimRow(
                "strength", "strength", "style distance falls at each of the weights 0, 0.25, 0.5, 0.75, 1",
                "for >= 95 % of the pictures", f"{falls:.1%} (means {means}; falls at each step for "
                f"{_shares(each)})", falls >= least, self._count(f"x 8 prompts x {len(prompts) // 8} seeds"),
            )
        ]  # fmt: skip

    def several(self) -> list[ClaimRow]:
        groups = unseen_pictures(self.size // 2, 5, offset=10_000)
        one, four = [], []
        loras = self.evaluator.make_loras("mini", [picture for group in groups for picture in group[:4]])
        for n, group in enumerate(groups):
            own, target = loras[4 * n : 4 * n + 4], [group[4]]
            one.append(style_distances(self.evaluator.generate(PROMPTS, own[0])[None], target))
            four.append(style_distances(self.evaluator.generate(PROMPTS, average_loras(own))[None], target))
        single, joint = torch.cat(one), torch.cat(four)
        return [
            ClaimRow(
                "several", "several pictures of one style: average",
                "mean style distance to a fifth picture: 4 pictures against 1", "4 <= 1",
                f"{spread(joint)} against {spread(single)}", bool(joint.mean() <= single.mean()),
                f"{len(groups)} styles x 8 prompts",
            )
        ]  # fmt: skip

    def coarse(self) -> list[ClaimRow]:
        kept, accuracy, distance = {}, {}, {}
        shapes = [picture.content.shape for picture in self.pictures for _ in range(4)]
        for name in ("mini", "mini-coarse", "mini-coarse-fine"):
            found = self.evaluator.classifier.shapes(self.neutral_images[name].flatten(0, 1))
            kept[name] = sum(a == b for a, b in zip(found, shapes, strict=True)) / len(shapes)
            accuracy[name] = self._accuracy(self.prompted_images[name])
            distance[name] = style_distances(self.prompted_images[name], self.pictures)
        self.sheets["detail"] = image_grid(
            [
                [self.pictures[n].image, *(as_image(self.neutral_images[name][n, 0]) for name in kept),
                 *(as_image(self.prompted_images[name][n, 3]) for name in ("mini", "mini-coarse"))]
                for n in range(min(8, len(self.pictures)))
            ],
            ["reference", "Style", "Coarse", "Coarse+Fine", "'a star', Style", "'a star', Coarse"],
            96,
        )  # fmt: skip
        means = {name: value.mean().item() for name, value in distance.items()}
        return [
            ClaimRow(
                "coarse", "Coarse keeps more content than Style", "reference's shape recognised, prompt 'a picture'",
                "Coarse > Style", f"{kept['mini-coarse']:.3f} > {kept['mini']:.3f}",
                kept["mini-coarse"] > kept["mini"], self._count("x 4 seeds"),
            ),
            ClaimRow(
                "coarse", "... at the price of semantic invasion", "prompted shape recognised, Style / Coarse",
                "report",
                f"{accuracy['mini']:.3f} / {accuracy['mini-coarse']:.3f}", None, self._count("x 8 prompts"),
            ),
            ClaimRow(
                "coarse", "... and of style", "style distance under the prompts, Style / Coarse", "report",
                f"{means['mini']:.3f} / {means['mini-coarse']:.3f}", None, self._count("x 8 prompts"),
            ),
        ]  # fmt: skip

    def fine(self) -> list[ClaimRow]:
        target = pixels_of(self.pictures)[:, None]
        error = {
            name: (self.neutral_images[name] - target).square().mean((1, 2, 3, 4)).sqrt()
            for name in self.neutral_images
        }
        coarse, fine = error["mini-coarse"], error["mini-coarse-fine"]
        return [
            ClaimRow(
                "fine", "Fine on top of Coarse keeps more detail", "RMS error of the reference, prompt 'a picture'",
                "Coarse + Fine < Coarse", f"{spread(fine)} < {spread(coarse)}, by {(coarse - fine).mean():.4f}, "
                f"smaller for {(fine < coarse).float().mean():.0%} of the pictures (Style: {error['mini'].mean():.3f})",
                bool(fine.mean() < coarse.mean()), self._count("x 4 seeds"),
            )
        ]  # fmt: skip

    def bias(self) -> list[ClaimRow]:
        own = torch.cat([self.evaluator.generate(PROMPTS, seed=8 * n) for n in range(self.size)])
        distance = {
            name: measures.set_distance(self.prompted_images[name].flatten(0, 1), own)
            for name in ("mini-coarse-fine", "mini-coarse-fine-bias")
        }
        without, with_it = distance.values()
        return [
            ClaimRow(
                "bias", "Bias brings images back to the base's own distribution",
                "distance of all images' statistics to the base's, with Bias / without", "with < without",
                f"{with_it:.3f} < {without:.3f}", with_it < without, self._count("x 8 prompts"),
            )
        ]  # fmt: skip

    def branch(self) -> list[ClaimRow]:
        grey, rows = grey_lora(self.evaluator, "mini"), []
        for scale in (1.0, 4.0) if self.quick else SCALES:
            by_branch = images_by_branch(self.evaluator, self.style_loras, grey, scale)
            far = [f"{style_distances(images, self.pictures).mean():.3f}" for images in by_branch.values()]
            shapes = [f"{self._accuracy(images):.3f}" for images in by_branch.values()]
            rows.append(
                ClaimRow(
                    "branch", f"the LoRA on one branch, cfg {scale:g}",
                    f"style distance; prompted shape recognised: {' / '.join(by_branch)}", "report",
                    f"{' / '.join(far)}; {' / '.join(shapes)}", None, self._count("x 8 prompts"),
                )
            )  # fmt: skip
        return rows

    @cached_property
    def trainings(self) -> StartTrainings:
        """LoRAs that are trained from several starts."""
        return StartTrainings(self.evaluator, QUICK if self.quick else WHOLE, self.records)

    def start(self) -> list[ClaimRow]:
        starts = self.trainings.trained()
        if not self.quick:
            self.sheets["start"] = start_claims.plot_starts(starts)
            self.sheets["start-pictures"] = start_claims.start_sheet(self.trainings, starts)
        return start_claims.start_rows(starts, self.trainings.plan)

    def number(self) -> list[ClaimRow]:
        return picture_claims.number_rows(self.evaluator, self.quick)

    def trained(self) -> list[ClaimRow]:
        return picture_claims.trained_rows(self.trainings, self.quick)

    def leakage(self) -> list[ClaimRow]:
        return picture_claims.leakage_rows(self.trainings, self.quick)

    def apart(self) -> list[ClaimRow]:
        groups = unseen_pictures(self.size // 2, 2, offset=20_000)
        loras = self.evaluator.make_loras("mini", [picture for group in groups for picture in group])
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
            ClaimRow(
                "apart", "two different styles give different LoRAs",
                "cosine between LoRAs, same style (other content) / different styles; share of cases in which the "
                "former is greater; the same with the mean LoRA taken off", "greater in >= 90 %",
                f"{spread(a)} / {spread(b)}; {order:.1%}; {spread(centred[same])} / {spread(centred[different])}",
                order >= 0.9, f"{len(groups)} styles x 2 pictures",
            )
        ]  # fmt: skip

    def kinds(self) -> list[ClaimRow]:
        """The shipped kind of head beside others. They are trained by the same loop but not shipped: no row where the
        file of one is missing."""
        paths = {words: self.evaluator.folder / f"{name}.safetensors" for name, words in OTHER_HEADS.items()}
        return [self._beside_shipped(words, path) for words, path in paths.items() if path.exists()]

    def _beside_shipped(self, words: str, heads: Path) -> ClaimRow:
        images = self._generate(PROMPTS, self.evaluator.make_loras("mini", self.pictures, heads))
        parts = self.images_by_weight[1.0], images, self.images_by_weight[0.0]
        own, other, without = (spread(style_distances(part, self.pictures)) for part in parts)
        own_shape, other_shape, _ = (self._accuracy(part) for part in parts)
        return ClaimRow(
            "kinds", "(choice of heads)", f"style distance: core kind (shipped) / {words} / without a LoRA", "none",
            f"{own} / {other} / {without}; shape accuracy {own_shape:.3f} / {other_shape:.3f}",
            None, self._count("x 8 prompts"),
        )  # fmt: skip

    def _count(self, what: str) -> str:
        """How many pictures, times ``what``."""
        return f"{len(self.pictures)} pictures {what}".strip()


NOTES = {
    "style": "the colours alone are well within the bound, the distance as a whole is not: textures and outlines of "
    "two pixels. A LoRA trained in the ordinary way on this base (300 steps, 128 pictures of a style, 4 styles) came "
    "to a distance of 0.295, no nearer: what is missing is in the base as much as in the heads. CI guards 0.3.",
}
OTHER_HEADS = {"style": "published kind, rank 4, equal parameters and steps", "queries": "the paper's queries"}
"""By the name of an expert of a training run, in words."""
CLAIMS: dict[str, Callable[[ClaimMeasurements], list[ClaimRow]]] = {
    name: getattr(ClaimMeasurements, name)
    for name in (
        "style",
        "content",
        "strength",
        "several",
        "number",
        "leakage",
        "coarse",
        "fine",
        "bias",
        "branch",
        "trained",
        "start",
        "apart",
        "kinds",
    )
}
TRAINING_CLAIMS = ("leakage", "trained", "start")
"""Those that train LoRAs, at rates that they choose once."""


def _colour_distances(images: torch.Tensor, pictures: Sequence[UnseenPicture]) -> torch.Tensor:
    """The same for its colour half."""
    return measures.mean_distances(measures.colour_distance, images, pixels_of(pictures))


def _shares(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.0%}" for value in values.tolist())
