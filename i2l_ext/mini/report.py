"""``docs/claims.md``: the table of claims, measured again, with its images."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from PIL import Image

from i2l_ext.converters.atomic import atomic_path
from i2l_ext.converters.errors import UserError

from .claims import CLAIMS, TRAINING_CLAIMS, ClaimMeasurements
from .evaluation import ClaimRow, Evaluator
from .records import Records

HEAD = """# Claims

What the authors of image-to-LoRA claim for their models, measured on mini, the test model in this repository. Mini has
a small world of its own. These figures show that the method and this software work, from the picture to the image in
the LoRA's style. They say nothing about the quality of the real models, whose weights were not available here.

Written by `i2l report`; `i2l report --only ROW` measures one row. No picture or style was in the training data: their
seeds start at 1,000,000. LoRAs are made as by `i2l make`, from PNG to bf16 factors. `a ± b` is the mean and the
standard deviation over pictures (or styles). Style distance: `i2l_ext/mini/measures.py`; 1 is the mean distance of two
unrelated styles.

The rows `start` train LoRAs of rank 8 on eight pictures with AdamW, batch 4, and read the loss on eight held-out
pictures of the style every 5 steps, for at most 300 steps. i2L makes its start of the same eight pictures. Each start
has its own learning rate, chosen on styles that are not counted. The lowest loss of a curve is taken for every start,
as if each run were stopped at its best. Mini's heads were trained on styles of this world: how much a start from the
real models gains, these rows cannot say. `i2l report --only start -o docs/claims.md --resume FOLDER` writes these
rows alone, and goes on after a break with what FOLDER holds.
"""

CAPTIONS = {
    "style": "Style: the reference, and the same prompt without the LoRA and with it at growing LoRA weights.",
    "detail": "Coarse and Fine: reference; the prompt 'a picture' with three models; 'a circle' with Style and Coarse.",
    "start": "Training a LoRA of rank 8 on eight pictures of a style: each start at its own best learning rate.",
    "start-pictures": "One of these trainings, 'a star': from a random start (above) and from i2L (below).",
}


def run_report(
    weights: Path | None,
    out: Path | None,
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    against: Path | None = None,
    resume: Path | None = None,
    log: Callable[[str], None] = print,
) -> list[str]:
    """Measure the claims and write the table to ``out``, unless that is None. One line for each claim whose figure is
    worse than it should be.

    ``weights`` is the folder of a training run, None for the shipped weights; ``against`` that of another run, whose
    figures are written beside the first's. ``only`` names the rows, by default all; the others stay in ``out`` as they
    are. ``resume``: a folder for the results of trainings as they come, from which a later run goes on. ``log`` gets a
    line of text for each row. Raises UserError for a row or a folder that does not exist.
    """
    for name in only:
        if name not in CLAIMS:
            raise UserError(f"There is no row {name!r}. There are: {', '.join(CLAIMS)}.")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"The folder {out.parent} does not exist.")
    for folder in (weights, against):
        if folder and not (folder / "base.safetensors").is_file():
            raise UserError(f"{folder} is not the folder of a training run: it has no base.safetensors.")
    records = Records(resume)
    rows, sheets = _measure(weights, quick, only or tuple(CLAIMS), records, log)
    others = _measure(against, quick, only or tuple(CLAIMS), records, log)[0] if against else []
    if out is not None:
        _write(out, rows, others, sheets, keep=bool(only))
    return [f"{row.claim}: {row.value}, bound {row.bound}" for row in rows if row.broken]


Sheets = dict[str, Image.Image]


def _measure(
    weights: Path | None, quick: bool, names: Sequence[str], records: Records, log: Callable[[str], None]
) -> tuple[list[ClaimRow], Sheets]:
    """The rows of the claims named, and their sheets. Those that train LoRAs take longer than all others, so they
    run in a process of their own."""
    groups = [[name for name in names if (name in TRAINING_CLAIMS) == slow] for slow in (False, True)]
    groups = [group for group in groups if group]
    with ProcessPoolExecutor(len(groups), multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(_measure_group, weights, quick, group, records) for group in groups]
        rows: dict[str, list[ClaimRow]] = {}
        sheets: Sheets = {}
        for part in as_completed(parts):
            new_rows, new_sheets = part.result()
            rows |= new_rows
            sheets |= new_sheets
            for row in (row for own in new_rows.values() for row in own):
                log(f"{_verdict(row):7} {row.claim}: {row.value} [{row.bound}]")
    return [row for name in names for row in rows[name]], {name: sheets[name] for name in CAPTIONS if name in sheets}


def _measure_group(
    weights: Path | None, quick: bool, names: Sequence[str], records: Records
) -> tuple[dict[str, list[ClaimRow]], Sheets]:
    torch.set_num_threads(1)
    measurements = ClaimMeasurements(Evaluator(weights), quick, records)
    return {name: measurements.rows(name) for name in names}, measurements.sheets


def _verdict(row: ClaimRow) -> str:
    if row.broken:
        return "BROKEN"
    return {True: "holds", False: "no", None: "-"}[row.holds]


def _write(out: Path, rows: Sequence[ClaimRow], others: Sequence[ClaimRow], sheets: Sheets, *, keep: bool) -> None:
    """Write the tables and the sheets. ``keep``: the rows of claims that were not measured, and their sheets, stay."""
    before = out.read_text(encoding="utf-8").splitlines() if keep and out.exists() else []
    measured = {row.name for row in rows}

    def merged(start: str, cells: int, new: Iterable[tuple[str, str]]) -> list[str]:
        """The ``new`` lines, each with its row's name, and for a claim that was not measured the lines before, which
        begin with ``start`` and have so many bars within; in the order of the claims."""
        kept = [
            (name, line)
            for name in CLAIMS
            for line in before
            if name not in measured and line.startswith(start.format(name)) and line.count(" | ") == cells
        ]
        return [line for name in CLAIMS for owner, line in (*kept, *new) if owner == name]

    held = {True: "yes", False: "**no**", None: "-"}
    first = [(r.name, (r.name, r.claim, r.measure, r.bound, r.value, held[r.holds], r.count)) for r in rows]
    pairs = {(row.name, row.measure): row.value for row in others}
    again = [(r.name, (r.name, r.measure, r.value, pairs.get((r.name, r.measure), "-"))) for r in rows if pairs]
    notes = [(r.name, f"- **{r.name}**: {r.note}") for r in rows if r.note and r.holds is False]
    lines = [HEAD, "| row | claim | measure | bound | measured | holds | over |", "|---|---|---|---|---|---|---|"]
    lines += merged("| {} |", 6, [(name, _line(cells)) for name, cells in first])
    if words := merged("- **{}**:", 0, notes):
        lines += ["", "What mini could not show:", "", *words]
    if second := merged("| {} |", 3, [(name, _line(cells)) for name, cells in again]):
        lines += ["", "The same from a second training run, by the same command (`--against`):", ""]
        lines += ["| row | measure | first run | second run |", "|---|---|---|---|", *second]
    folder = out.with_suffix("")
    if sheets:
        folder.mkdir(exist_ok=True)
    for name, image in sheets.items():
        with atomic_path(folder / f"{name}.png", overwrite=True) as part:
            image.save(part, format="PNG", optimize=True)
    for name, caption in CAPTIONS.items():
        if name in sheets or (before and (folder / f"{name}.png").exists()):
            lines += ["", caption, "", f"![{caption}]({folder.name}/{name}.png)"]
    with atomic_path(out, overwrite=True) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
