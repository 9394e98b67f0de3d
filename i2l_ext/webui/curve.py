"""The curve of the Train pane: how much of a LoRA's energy each rank keeps, as an SVG in the theme's colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from i2l_ext.engine.queue import Job
from i2l_ext.webui.html import facts, percent, value, word
from i2l_ext.webui.texts import WORDS

WIDE, HIGH = 640, 220
"""Of the drawing of a curve, in its own units."""


def curve(job: Job, rank: int) -> str:
    """How much of the energy each rank keeps, drawn with the theme's colours, and what ``rank`` keeps."""
    kept = job.result["kept"]
    most, rest = len(kept["all"]), {kind: shares for kind, shares in kept.items() if kind != "all"}
    rank = min(max(rank, 1), most)
    weakest = min(rest or kept, key=lambda kind: kept[kind][rank - 1])

    def across(number: float) -> float:
        return 40 + (WIDE - 60) * number / most

    def up(share: float) -> float:
        return HIGH - 30 - (HIGH - 50) * share

    def line(shares: Sequence[float], name: str) -> str:
        points = " ".join(f"{across(n):.1f},{up(share):.1f}" for n, share in enumerate((0.0, *shares)))
        return f'<polyline class="i2l-line-{name}" points="{points}"/>'

    grid = "".join(
        f'<path class="i2l-grid" d="M{across(0):.1f} {up(share):.1f}H{across(most):.1f}"/>'
        f'<text x="34" y="{up(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        for share in (0, 0.5, 0.9, 1)
    )
    ticks = "".join(
        f'<text x="{across(n):.1f}" y="{HIGH - 12}" text-anchor="middle">{n}</text>'
        for n in sorted({1, most // 4, most // 2, 3 * most // 4, most} - {0})
    )
    here = f"{across(rank):.1f}"
    lines = "".join(line(shares, "kind") for shares in rest.values()) + line(kept["all"], "all")
    mark = (
        f'<path class="i2l-mark" d="M{here} {up(0):.1f}V{up(1):.1f}"/>'
        f'<circle class="i2l-mark" cx="{here}" cy="{up(kept["all"][rank - 1]):.1f}" r="4"/>'
    )
    told = facts((
        ("rank", value(rank)), ("all_layers", value(percent(kept["all"][rank - 1]))),
        ("weakest", value(f"{percent(kept[weakest][rank - 1])} ({weakest})")),
    ))  # fmt: skip
    return (
        f'<article class="i2l-result i2l-wide" data-i2l-id="{job.id}"><h4>{word("rank_keeps")} {value(job.title)}</h4>'
        f'<svg class="i2l-curve" viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{escape(WORDS["rank_keeps"])}">'
        f"{grid}{ticks}{lines}{mark}</svg>{told}</article>"
    )
