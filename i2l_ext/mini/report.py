"""``docs/claims.md``: the table of claims, recomputed from the weights, with its pictures."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from PIL import Image

from i2l_ext.converters.atomic import atomic_path
from i2l_ext.converters.errors import UserError
from i2l_ext.mini.claims import TRIALS, Row, Trials
from i2l_ext.mini.evaluation import Lab

HEAD = """# Claims

What the authors of image-to-LoRA say of their models, measured on the miniature that lies in this repository. The
miniature is a small world of its own: these figures say that the method and this software work from the picture to
the drawing in the LoRA's style. They say nothing about how good the real models are, whose weights we could not reach.

Written by `i2l report`; a single row again with `i2l report --only ROW`. Every picture and style here has a seed that
training never saw (from 1,000,000 on). The row `kinds` needs `--weights` with a training run's own folder, where the
heads that measured worse are kept too. LoRAs are made the way `i2l make` makes them, from PNG to bf16 factors.
`a ± b` is the mean and the standard deviation over pictures (or styles). Style distance: `i2l_ext/mini/measures.py`;
1 is the mean distance of two unrelated styles.
"""

CAPTIONS = {
    "style": "Style: reference, the same prompt without the LoRA, and with it at growing weight.",
    "detail": "Coarse and Fine: reference; the prompt 'a picture' with three models; 'a star' with Style and Coarse.",
    "start": "Training a LoRA of rank 8 on eight pictures of one style: five styles, and their mean.",
    "start-pictures": "One of these trainings, 'a circle': above from a random start, below from i2L.",
}


def run(
    weights: Path | None,
    out: Path | None,
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    against: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Measures, and writes the table to ``out`` unless it is None; the rows whose bound does not hold, one line each.

    ``against`` is the folder of another training run, whose figures are set beside the first. Raises UserError for a
    row or a folder that does not exist.
    """
    for name in only:
        if name not in TRIALS:
            raise UserError(f"There is no row {name!r}. There are: {', '.join(TRIALS)}.")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"The folder {out.parent} does not exist.")
    for folder in (weights, against):
        if folder and not (folder / "base.safetensors").is_file():
            raise UserError(f"{folder} is not the folder of a training run: it has no base.safetensors.")
    rows, pictures = _measured(weights, quick, only or tuple(TRIALS), say)
    others = _measured(against, quick, only or tuple(TRIALS), say)[0] if against else []
    if out is not None:
        _write(out, rows, others, pictures)
    return [f"{row.claim}: {row.value}, bound {row.bound}" for row in rows if row.broken]


Pictures = dict[str, Image.Image]


def _measured(
    weights: Path | None, quick: bool, names: Sequence[str], say: Callable[[str], None]
) -> tuple[list[Row], Pictures]:
    """The rows named and their pictures. `start`, which takes as long as all others together, has a process of its
    own."""
    groups = [
        part for part in (tuple(n for n in names if n != "start"), tuple(n for n in names if n == "start")) if part
    ]
    with ProcessPoolExecutor(len(groups), multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(_group, weights, quick, group) for group in groups]
        rows: dict[str, list[Row]] = {}
        pictures: Pictures = {}
        for part in as_completed(parts):
            found, drawn = part.result()
            rows |= found
            pictures |= drawn
            for row in (row for own in found.values() for row in own):
                say(f"{_verdict(row):7} {row.claim}: {row.value} [{row.bound}]")
    return [row for name in names for row in rows[name]], {
        name: pictures[name] for name in CAPTIONS if name in pictures
    }


def _group(weights: Path | None, quick: bool, names: Sequence[str]) -> tuple[dict[str, list[Row]], Pictures]:
    torch.set_num_threads(1)
    trials = Trials(Lab(weights), quick)
    return {name: trials.run([name]) for name in names}, trials.pictures


def _verdict(row: Row) -> str:
    if row.broken:
        return "BROKEN"
    return {True: "holds", False: "no", None: "-"}[row.holds]


def _write(out: Path, rows: Sequence[Row], others: Sequence[Row], pictures: Pictures) -> None:
    lines = [HEAD, "| row | claim | measure | bound | measured | holds | over |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        holds = {True: "yes", False: "**no**", None: "-"}[row.holds]
        lines.append(
            f"| {row.name} | {row.claim} | {row.measure} | {row.bound} | {row.value} | {holds} | {row.count} |"
        )
    notes = [f"- **{row.name}**: {row.note}" for row in rows if row.note and row.holds is False]
    if notes:
        lines += ["", "What could not be shown in miniature:", "", *notes]
    if others:
        lines += ["", "The same from a second training run from nothing, by the same command (`--against`):", ""]
        lines += ["| row | measure | first run | second run |", "|---|---|---|---|"]
        pairs = {(row.name, row.measure): row.value for row in others}
        lines += [
            f"| {row.name} | {row.measure} | {row.value} | {pairs.get((row.name, row.measure), '-')} |" for row in rows
        ]
    folder = out.with_suffix("")
    if pictures:
        folder.mkdir(exist_ok=True)
    for name, image in pictures.items():
        with atomic_path(folder / f"{name}.png", overwrite=True) as part:
            image.save(part, format="PNG", optimize=True)
        lines += ["", CAPTIONS[name], "", f"![{CAPTIONS[name]}]({folder.name}/{name}.png)"]
    with atomic_path(out, overwrite=True) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
