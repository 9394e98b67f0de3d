"""Jobs on the page: those at work and waiting, where their button was pressed, and why one failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from i2l_ext.engine.job import Job, Log
from i2l_ext.engine.queue import BRIEF
from i2l_ext.webui.markup import Markup, action_button, element, error_line, format_seconds, join, sized, value, word
from i2l_ext.webui.texts import STEPS, WORDS
from i2l_ext.webui.training_view import show_log

PAUSED = {"download": {"cancel": "pause", "cancelled": "paused"}}
"""Kinds of jobs that go on where they were stopped -> other words for that."""

ANSWERS = {
    "untrusted": ("code_unagreed", "see_code", "look_at_code", "make"),
    "no_diffsynth": ("no_diffsynth", "set_up_diffsynth", "plan_setup", "make"),
}
"""Code of a failure that a button can answer -> what is said in place of the engine's words, which are for a terminal;
the button, its action, and the pane where that goes on."""


def overview(active: Sequence[Job], places: Mapping[str, str | None]) -> Markup:
    """The jobs at work, each in one word or two that lead to its pane; with no pane (``places``: job -> pane) the whole
    job. The script polls fast while ``data-active`` is 1."""
    shown = [job for job in active if job.kind not in BRIEF]
    lines = [_brief(job, pane) if (pane := places.get(job.id)) else _job(job) for job in shown]
    return element("div", lines, id="i2l_jobs", data_active=int(bool(active)))


def _brief(job: Job, pane: str) -> Markup:
    percent = value(f"{min(100 * job.view()['share'], 99):.0f} %") if job.state != "waiting" else word("waiting")
    return element(
        "button", _title(job), percent, type="button", class_="i2l-brief", data_i2l="goto", data_i2l_target=pane
    )


def activity(active: Sequence[Job], failed: Sequence[Job], log_of: Callable[[Job], Log], pane: str) -> Markup:
    """The jobs of a pane that are at work and waiting, and those that did not end well. ``log_of``: what is shown of a
    log."""
    lines = [[_job(job), show_log(log_of(job))] for job in active if job.kind not in BRIEF]
    return element("div", lines, [failure(job, pane) for job in failed], class_="i2l-jobs")


def _job(job: Job) -> Markup:
    view = job.view()
    percent = round(100 * view["share"], 1)
    named = f"{WORDS.get(job.kind, job.kind)} {job.title}"
    cancel = element(
        "button", word(_word(job, "cancel")), type="button", class_="i2l-button", data_i2l="cancel",
        data_i2l_job=job.id, aria_label=f"{WORDS[_word(job, 'cancel')]} {job.title}",
    )  # fmt: skip
    bar = element(
        "div", element("i", style=f"width:{percent}%"), class_="i2l-bar", role="progressbar", aria_valuemin=0,
        aria_valuemax=100, aria_valuenow=percent, aria_label=named,
    )  # fmt: skip
    header = element("header", _title(job), element("em", word(job.state), class_="i2l-state"), cancel)
    return element("section", header, bar, _progress(view), class_="i2l-job", data_i2l_id=job.id)


def _word(job: Job, key: str) -> str:
    """The key of WORDS for this kind of job."""
    return PAUSED.get(job.kind, {}).get(key, key)


def _title(job: Job) -> Markup:
    kind = word(job.kind) if job.kind in WORDS else value(job.kind)
    return join(element("b", kind, " ", value(job.title)), " ")


def _progress(view: Mapping[str, Any]) -> Markup:
    step, parts = view["step"], []
    if step is not None:
        kind, _, rest = step.get("id", step["title"]).partition(" ")
        name = join(word(kind), " ", value(rest)) if kind in STEPS else value(step["title"])
        parts.append(join(word("step"), " ", value(f"{step['number']}/{step['of']}"), ": ", name))
        if total := step.get("bytes"):
            parts.append(sized(step["share"] * total, total))
        if layers := step.get("layers"):
            parts.append(join(value(f"{round(step['share'] * layers)} / {layers}"), " ", word("layers")))
    if view["started"]:
        parts.append(value(format_seconds(view["seconds"])))
    if view["left"] is not None and view["left"] >= 1:  # less is no estimate: the file is still to be written
        parts.append(join(value(format_seconds(view["left"])), " ", word("left")))
    if view["cached"]:
        parts.append(join(word("cached"), ": ", value(len(view["cached"]))))
    return element("p", [join(" · " if number else None, part) for number, part in enumerate(parts)], class_="i2l-step")


def failure(job: Job, pane: str) -> Markup:
    """What went wrong, with the end of the engine's output, until it is dismissed."""
    dismiss = element(
        "button", "×", type="button", class_="i2l-button i2l-dismiss", data_i2l="dismiss", data_i2l_text=job.id,
        title=WORDS["dismiss"], aria_label=f"{WORDS['dismiss']}: {job.title}",
    )  # fmt: skip
    state = _word(job, "cancelled") if job.state == "cancelled" else "failed"
    header = element("header", _title(job), element("em", word(state), class_="i2l-state"), dismiss)
    told = {"class_": "i2l-job i2l-failed", "data_i2l_id": job.id, "data_i2l_said": f"{job.title}: {WORDS[state]}"}
    if job.state == "cancelled":
        return element("section", header, **told)
    answer = ANSWERS.get(job.code or "")
    if answer is not None:
        said, key, action, pane = answer
        act = action_button(key, action, primary=True, model=str(job.request.get("model")), pane=pane)
        return element("section", header, element("p", word(said), class_="i2l-error", role="alert"), act, **told)
    hint = element("p", job.hint) if job.hint else None
    if job.kind == "download":  # what has arrived is kept
        hint = join(hint, action_button("resume", "offer", primary=True, model=job.title, pane=pane))
    last = element("details", element("summary", word("last_output")), element("pre", "\n".join(job.tail), tabindex=0))
    return element("section", header, error_line(job.error or ""), hint, last if job.tail else None, **told)
