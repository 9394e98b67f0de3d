"""The curve of the Train pane: how much of a LoRA's effect each rank keeps, as an SVG in the theme's colours."""

from __future__ import annotations

from collections.abc import Sequence

from i2l_ext.engine.job import Job
from i2l_ext.webui.markup import Markup, element, facts, format_share, value, word
from i2l_ext.webui.texts import WORDS

WIDTH, HEIGHT = 640, 220
"""Of the drawing, in its own units."""


def show_rank_curve(job: Job, rank: int) -> Markup:
    """The curve of the whole LoRA and of each kind of layer, and what ``rank`` keeps."""
    kept = job.result["kept"]
    most, kinds = len(kept["all"]), {kind: shares for kind, shares in kept.items() if kind != "all"}
    rank = min(max(rank, 1), most)
    weakest = min(kinds or kept, key=lambda kind: kept[kind][rank - 1])

    def x(number: float) -> str:
        return f"{40 + (WIDTH - 60) * number / most:.1f}"

    def y(share: float, shift: float = 0) -> str:
        return f"{HEIGHT - 30 - (HEIGHT - 50) * share + shift:.1f}"

    def line(shares: Sequence[float], name: str) -> Markup:
        points = " ".join(f"{x(number)},{y(share)}" for number, share in enumerate((0.0, *shares)))
        return element("polyline", class_=f"i2l-line-{name}", points=points)

    grid = [
        (element("path", class_="i2l-grid", d=f"M{x(0)} {y(share)}H{x(most)}"),
         element("text", f"{share:.0%}", x=34, y=y(share, 4), text_anchor="end"))
        for share in (0, 0.5, 0.9, 1)
    ]  # fmt: skip
    ticks = [
        element("text", number, x=x(number), y=HEIGHT - 12, text_anchor="middle")
        for number in sorted({1, most // 4, most // 2, 3 * most // 4, most} - {0})
    ]
    marks = (
        element("path", class_="i2l-mark", d=f"M{x(rank)} {y(0)}V{y(1)}"),
        element("circle", class_="i2l-mark", cx=x(rank), cy=y(kept["all"][rank - 1]), r=4),
    )
    lines = [line(shares, "kind") for shares in kinds.values()]
    drawing = element(
        "svg", grid, ticks, lines, line(kept["all"], "all"), marks, class_="i2l-curve",
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=WORDS["rank_keeps"],
    )  # fmt: skip
    told = facts(
        ("rank", value(rank)), ("all_layers", value(format_share(kept["all"][rank - 1]))),
        ("weakest", value(f"{format_share(kept[weakest][rank - 1])} ({weakest})")),
    )  # fmt: skip
    title = element("h4", word("rank_keeps"), " ", value(job.title))
    return element("article", title, drawing, told, class_="i2l-result i2l-wide", data_i2l_id=job.id)
