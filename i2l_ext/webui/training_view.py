"""A training run on the page: the log and the loss of a trainer at work, and the LoRA that it has made."""

from __future__ import annotations

from collections.abc import Sequence

from i2l_ext.engine.job import Job, Log
from i2l_ext.webui.markup import Markup, action_button, element, facts, format_took, value, word
from i2l_ext.webui.texts import WORDS

WIDTH, HEIGHT = 640, 160
"""Of the drawing, in its own units."""

SHOWN_LINES = 12


def show_log(log: Log) -> Markup | None:
    """The loss so far, and the end of the log. None where there is nothing yet."""
    if not log.lines:
        return None
    text = "\n".join(log.lines[-SHOWN_LINES:])
    return element("div", loss_curve(log.losses), element("pre", text, tabindex=0, aria_label=WORDS["log"]))


def loss_curve(losses: Sequence[tuple[int, float]]) -> Markup | None:
    """The loss over the steps, with its last value. None for fewer than two."""
    if len(losses) < 2:
        return None
    steps, values = zip(*losses, strict=True)
    low, high, first, last = min(values), max(values), steps[0], max(steps[-1], steps[0] + 1)
    span = high - low or 1.0

    def at(step: float, loss: float) -> tuple[float, float]:
        return 50 + (WIDTH - 70) * (step - first) / (last - first), 15 + (HEIGHT - 45) * (high - loss) / span

    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(step, loss) for step, loss in losses))
    marks = [
        element("text", f"{loss:.3g}", x=44, y=f"{at(first, loss)[1] + 4:.1f}", text_anchor="end")
        for loss in dict.fromkeys((low, high))
    ]
    ticks = [
        element("text", step, x=f"{at(step, low)[0]:.1f}", y=HEIGHT - 8, text_anchor="middle")
        for step in (first, steps[-1])
    ]
    title = element("h4", word("loss_curve"), " ", value(f"{values[-1]:.4g}"))
    drawing = element(
        "svg", marks, ticks, element("polyline", class_="i2l-line-all", points=points), class_="i2l-curve",
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=WORDS["loss_curve"],
    )  # fmt: skip
    return element("div", title, drawing)


def show_run(job: Job) -> Markup:
    """The LoRA that a trainer has made."""
    result = job.result
    told = facts(
        ("trained_from", value(result["trainer"])), ("rank", value(result["rank"])),
        ("modules", value(result["modules"])), ("time", value(format_took(result["seconds"]))),
    )  # fmt: skip
    return element(
        "article", word("saved_as_file"), " ", element("b", value(result["file"])), told,
        loss_curve([(step, loss) for step, loss in result["losses"]]),
        element(
            "div", action_button("inspect", "choose", file=result["file"], goto="inspect"), class_="i2l-buttons"
        ),
        class_="i2l-result i2l-wide", data_i2l_id=job.id, data_i2l_made="again",
        data_i2l_said=f"{job.title}: {WORDS['done']}",
    )  # fmt: skip
