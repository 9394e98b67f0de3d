"""The parts of the page that gradio has no component for: pictures, models, jobs at work. Results are in results.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from i2l_ext.engine.job import Job
from i2l_ext.engine.queue import BRIEF
from i2l_ext.service.model_list import MINIATURE, missing_parts
from i2l_ext.webui.markup import (
    Markup,
    element,
    error_line,
    facts,
    format_bytes,
    format_seconds,
    join,
    quiet_line,
    table,
    value,
    word,
)
from i2l_ext.webui.texts import CONTROLS, STEPS, WORDS


def heading(note: str | None, languages: Mapping[str, str] | None = None) -> Markup:
    """The top of the tab: a key of WORDS as a notice, and a choice of ``languages`` where no WebUI has one."""
    options = [element("option", name, value=code) for code, name in (languages or {}).items()]
    choice = element(
        "label", word("language"), " ",
        element("select", element("option", WORDS["by_browser"], value=""), options, data_i2l_language=True),
        class_="i2l-language",
    )  # fmt: skip
    notice = element("p", word(note), class_="i2l-notice", role="note") if note else None
    lost = element("p", word("unreachable"), class_="i2l-error", id="i2l_lost", role="alert", hidden=True)
    return element("div", choice if languages else None, element("p", word("line")), notice, lost, class_="i2l-head")


def tips() -> Markup:
    """Tooltips, which the script puts on the controls."""
    return join([element("i", text.tip, data_i2l_for=f"i2l_{id}") for id, text in CONTROLS.items() if text.tip])


def drop_zone(id: str, key: str, *, accept: str, many: bool = False) -> Markup:
    """A place to drop files on, or to press; the script uploads them."""
    label = CONTROLS[id].label
    return element(
        "div", element("b", label), word(key),
        element("input", type="file", accept=accept, aria_label=label, multiple=many),
        element("em", word("uploading"), " ", element("i", class_="i2l-value"), hidden=True),
        element("p", word("not_uploaded"), class_="i2l-error", role="alert", hidden=True),
        class_="i2l-drop", data_i2l_drop=id,
    )  # fmt: skip


def tray(pictures: Sequence[Mapping[str, Any]], errors: Iterable[str] = (), turn: object = "") -> Markup:
    """The pictures for a LoRA: ``{id, picture, weight}``, and what was wrong with others. ``turn``: the upload that
    this answers; the script sends the next one after it."""
    cards = element("ul", [_card(number, one) for number, one in enumerate(pictures, 1)], class_="i2l-tray")
    empty = element("p", word("no_pictures"), class_="i2l-quiet")
    return element("div", cards if pictures else empty, list(map(error_line, errors)), data_i2l_turn=turn)


def _card(number: int, one: Mapping[str, Any]) -> Markup:
    remove = element(
        "button", "×", type="button", class_="i2l-remove", data_i2l="remove", title=WORDS["remove"],
        aria_label=f"{WORDS['remove']} {number}",
    )  # fmt: skip
    weight = element(
        "input", type="number", data_i2l="weight", min="0.1", max="100", step="0.1", value=f"{one['weight']:g}"
    )
    image = element("img", src=one["picture"], alt="")
    return element(
        "li", image, remove, element("label", word("share"), weight), class_="i2l-card", data_i2l_id=one["id"]
    )


def model_choice(rows: Sequence[Mapping[str, Any]] | None, chosen: str) -> Markup:
    """A radio button for each model."""
    if rows is None:
        return quiet_line("looking")
    lines = [
        element(
            "label", element("input", type="radio", name="i2l_model", value=row["name"], checked=row["name"] == chosen),
            element("b", row["name"]), element("span", row["line"]), _readiness(row), class_="i2l-model",
        )
        for row in rows
    ]  # fmt: skip
    note = quiet_line("mini_note") if any(row["name"] == MINIATURE for row in rows) else None
    return join(element("div", lines, class_="i2l-models", role="radiogroup", aria_label=WORDS["model"]), note)


def _readiness(row: Mapping[str, Any]) -> Markup:
    if row["ready"]:
        return element("em", word("ready"), class_="i2l-ready")
    return element("em", word("to_download"), " ", value(format_bytes(row["download_bytes"])), class_="i2l-missing")


def model_table(rows: Sequence[Mapping[str, Any]] | None, *, places: bool) -> Markup:
    """All models, their files, licences, and whether they are downloaded; with ``places`` in which folders."""
    if rows is None:
        return quiet_line("looking")
    details = []
    for row in rows:
        parts = [
            (value(part["id"]), value(format_bytes(part["bytes"])), value(part["licence"]), _place(part, places))
            for part in row["parts"]
        ]
        title = element("summary", element("b", row["name"]), " ", element("span", row["line"]), " ", _readiness(row))
        details.append(element("details", title, table(("part", "size", "licence", "place"), parts)))
    return element("div", details, class_="i2l-catalogue")


def _place(part: Mapping[str, Any], places: bool) -> Markup:
    if places and (part["problem"] or part["path"]):
        return value(part["problem"] or part["path"])
    return word("here" if part["path"] and not part["problem"] else "not_here")


def download_facts(row: Mapping[str, Any], *, places: bool) -> Markup:
    """What a model lacks, where that comes from and goes to (with ``places``), and a tick that agrees to its licences:
    to those of this model, so it goes with the model."""
    parts = [
        (value(part["id"]), value(format_bytes(part["bytes"])), value(part["repo"]), value(part["licence"]))
        for part in missing_parts(row)
    ]
    pairs: list[tuple[str, object]] = [("model", value(row["name"]))]
    if parts:
        pairs.append(("to_download", value(format_bytes(row["download_bytes"]))))
    if places:
        pairs.append(("goes_to", value(row["download_folder"])))
    tick = element("input", type="checkbox", name="i2l_agreed", value=row["name"])
    agree = element("label", tick, " ", word("agree"), class_="i2l-agree")
    rest = join(table(("part", "size", "origin", "licence"), parts), agree) if parts else quiet_line("all_here")
    return element("div", facts(*pairs), rest, data_i2l_choice=row["name"])


def activity(active: Sequence[Job], failed: Job | None) -> Markup:
    """The jobs at work and waiting, and the last one if it failed. The script polls fast while ``data-active`` is
    1."""
    lines = [_job(job) for job in active if job.kind not in BRIEF]
    last = None if failed is None else failure(failed)
    return element("div", lines, last, id="i2l_jobs", data_active=int(bool(active)), aria_live="polite")


def _job(job: Job) -> Markup:
    view = job.view()
    percent = round(100 * view["share"], 1)
    cancel = element(
        "button", word("cancel"), type="button", class_="i2l-button", data_i2l="cancel", data_i2l_job=job.id
    )
    bar = element(
        "div", element("i", style=f"width:{percent}%"), class_="i2l-bar", role="progressbar", aria_valuemin=0,
        aria_valuemax=100, aria_valuenow=percent, aria_label=f"{WORDS.get(job.kind, job.kind)} {job.title}",
    )  # fmt: skip
    header = element("header", _title(job), element("em", word(job.state), class_="i2l-state"), cancel)
    return element("section", header, bar, _progress(view), class_="i2l-job", data_i2l_id=job.id)


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
            parts.append(value(f"{format_bytes(step['share'] * total)} / {format_bytes(total)}"))
        if layers := step.get("layers"):
            parts.append(join(value(f"{round(step['share'] * layers)} / {layers}"), " ", word("layers")))
    if view["started"]:
        parts.append(value(format_seconds(view["seconds"])))
    if view["left"] is not None:
        parts.append(join(value(format_seconds(view["left"])), " ", word("left")))
    parts += [join(value(title), " ", word("cached")) for title in view["cached"]]
    return element("p", [join(" · " if number else None, part) for number, part in enumerate(parts)], class_="i2l-step")


def failure(job: Job) -> Markup:
    """What went wrong, with the end of the engine's output."""
    if job.state == "cancelled":
        return element("section", _title(job), element("em", word("cancelled")), class_="i2l-job")
    header = element("header", _title(job), element("em", word("failed"), class_="i2l-state"))
    hint = element("p", job.hint) if job.hint else None
    last = element("details", element("summary", word("last_output")), element("pre", "\n".join(job.tail)))
    return element(
        "section", header, error_line(job.error or ""), hint, last if job.tail else None, class_="i2l-job i2l-failed"
    )
