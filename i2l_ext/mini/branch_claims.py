"""What a LoRA does on the positive branch of guidance, on both, and with the LoRA of a grey picture on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from i2l_ext.branch import Strength
from i2l_ext.converters.lora import Lora

from . import looks, world
from .evaluation import PROMPTS, ClaimRow, Evaluator, UnseenPicture, style_distances

SCALES = (1.0, 2.0, 4.0, 7.0)
"""Of guidance (cfg). 1 has no negative branch."""
BRANCHES: Mapping[str, tuple[Strength, Strength]] = {
    "positive": (Strength(1.0), Strength(0.0, 0.0)),
    "both": (Strength(1.0, 1.0), Strength(0.0, 0.0)),
    "grey": (Strength(1.0), Strength(0.0, 1.0)),
}
"""Where a LoRA acts -> strengths of the LoRA and of the grey one."""
GREY = Image.new("RGB", (256, 256), (128, 128, 128))
"""The picture whose LoRA the authors put on the negative branch."""


def grey_lora(evaluator: Evaluator, model_name: str) -> Lora:
    """The LoRA of the grey picture, made as `i2l make` does."""
    nothing = UnseenPicture(looks.NEUTRAL, world.Content("circle"), GREY, torch.full((3, 64, 64), 0.5))
    return evaluator.make_loras(model_name, [nothing])[0]


def images_by_branch(evaluator: Evaluator, loras: Sequence[Lora], grey: Lora, scale: float) -> dict[str, torch.Tensor]:
    """Images of the eight prompts with each of N LoRAs: branch -> [N, 8, 3, 64, 64]. Without a negative branch, at
    scale 1, all three are one."""
    branches = ["positive"] if scale == 1 else list(BRANCHES)
    found: dict[str, list[torch.Tensor]] = {branch: [] for branch in branches}
    for lora in loras:
        adapter = evaluator.sampler.adapter([lora, grey])
        for branch in branches:
            images = evaluator.sampler.generate_guided(adapter, BRANCHES[branch], PROMPTS, range(len(PROMPTS)), scale)
            found[branch].append(images)
    return {branch: torch.stack(images) for branch, images in found.items()}


def branch_rows(
    evaluator: Evaluator, pictures: Sequence[UnseenPicture], loras: Sequence[Lora], quick: bool
) -> list[ClaimRow]:
    """What guidance makes of the LoRA of each picture, by branch and scale."""
    grey, rows = grey_lora(evaluator, "mini"), []
    for scale in (1.0, 4.0) if quick else SCALES:
        by_branch = images_by_branch(evaluator, loras, grey, scale)
        far = [f"{style_distances(images, pictures).mean():.3f}" for images in by_branch.values()]
        right = [f"{evaluator.accuracy(images):.3f}" for images in by_branch.values()]
        rows.append(
            ClaimRow(
                "branch", f"the LoRA on one branch, cfg {scale:g}",
                f"style distance; prompted thing recognised: {' / '.join(by_branch)}", "report",
                f"{' / '.join(far)}; {' / '.join(right)}", None, f"{len(pictures)} pictures x 8 prompts",
            )
        )  # fmt: skip
    return rows
