"""``docs/claims.md``: the table of claims, recomputed from the weights, with its pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import appearing

from .lab import Lab
from .trials import TRIALS, Row, Trials

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
    trials = Trials(Lab(weights), quick)
    rows = _rows(trials, only or tuple(TRIALS), say)
    others = _rows(Trials(Lab(against), quick), only or tuple(TRIALS), say) if against else []
    if out is not None:
        _write(out, rows, others, trials)
    return [f"{row.claim}: {row.value}, bound {row.bound}" for row in rows if row.broken]


def _rows(trials: Trials, names: Sequence[str], say: Callable[[str], None]) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        began = time.monotonic()
        found = trials.run([name])
        rows += found
        for row in found:
            say(f"{_verdict(row):7} {row.claim}: {row.value} [{row.bound}] {time.monotonic() - began:.0f} s")
    return rows


def _verdict(row: Row) -> str:
    if row.broken:
        return "BROKEN"
    return {True: "holds", False: "no", None: "-"}[row.holds]


def _write(out: Path, rows: Sequence[Row], others: Sequence[Row], trials: Trials) -> None:
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
    if trials.pictures:
        folder.mkdir(exist_ok=True)
    for name, image in trials.pictures.items():
        with appearing(folder / f"{name}.png", overwrite=True) as part:
            image.save(part, format="PNG", optimize=True)
        lines += ["", CAPTIONS[name], "", f"![{CAPTIONS[name]}]({folder.name}/{name}.png)"]
    with appearing(out, overwrite=True) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
