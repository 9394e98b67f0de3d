"""The tab: its layout, and what happens when something is pressed. Panes are in panes.py, words in texts.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.queue import ENDED, Job
from i2l_ext.webui import disk, gradio_versions, html, panes
from i2l_ext.webui.curve import curve
from i2l_ext.webui.service import Desk
from i2l_ext.webui.settings import OPTIONS
from i2l_ext.webui.texts import WORDS

DEFAULTS = {"i2l_dialect": "dialect", "i2l_dtype": "dtype", "i2l_subfolder": "subfolder"}
"""Setting -> the control of the Make pane that begins with it."""

LANGUAGES = {"en": "English", "zh_CN": "简体中文", "ru_RU": "Русский"}

Show = Callable[[Job, Desk, Mapping[str, Any]], str]

RESULTS: Mapping[str, tuple[tuple[str, ...], Show]] = {
    "make": (("make_result",), lambda job, desk, form: html.made(job, not desk.host.alone)),
    "inspect": (("inspect_result",), lambda job, desk, form: html.inspected(job)),
    "convert": (("convert_result",), lambda job, desk, form: html.converted(job)),
    "mend": (("make_mended", "inspect_mended"), lambda job, desk, form: html.mended(job)),
    "curve": (("train_curve",), lambda job, desk, form: curve(job, panes.slider(form.get("rank")))),
    "export": (("train_result",), lambda job, desk, form: html.exported(job)),
    "download": (("models_result",), lambda job, desk, form: html.downloaded(job)),
    "verify": (("models_result",), lambda job, desk, form: html.verified(job)),
    "doctor": (("doctor_result",), lambda job, desk, form: html.doctor(job)),
}
"""Kind of job -> the blocks that show what came of it, and how."""


def build(desk: Desk) -> dict[str, Any]:
    """The whole tab, inside the gr.Blocks that is open; its components by name."""
    note = "alone" if desk.host.alone else None if desk.host.applies else "not_applied"
    c: dict[str, Any] = {}
    with gr.Column(elem_id="i2l"):
        languages = LANGUAGES if desk.host.alone else None
        c["heading"] = gr.HTML(html.heading(note, languages=languages), elem_id="i2l_heading")
        c["activity"] = gr.HTML(html.activity([], None), elem_id="i2l_activity")
        c["mend_error"] = gr.HTML("", elem_id="i2l_mend_error")
        with gr.Tabs(elem_id="i2l_panes"):
            for id, pane in panes.PANES.items():
                if id != "settings" or desk.host.alone:
                    with gr.Tab(WORDS[f"pane_{id}"], elem_id=f"i2l_pane_{id}"):
                        pane(desk, c)
        with gr.Group(elem_id="i2l_hidden"):
            for id in ("form", "target", "uploaded"):
                c[id] = gr.Textbox(value="", label=id, elem_id=f"i2l_{id}")
            for id in ("poll", "cancel", "take", "mend"):
                c[id] = gr.Button(id, elem_id=f"i2l_{id}")
            c["tips"] = gr.HTML(html.tips(), elem_id="i2l_tips")
    c["seen"] = gr.State({})
    for component in c.values():
        component.do_not_save_to_config = True
    _bind(desk, c)
    return c


def _bind(desk: Desk, c: dict[str, Any]) -> None:
    settings = [option.key for option in OPTIONS if option.key in c] if desk.host.alone else []
    shown = [*settings, *DEFAULTS.values(), "activity", "models", "catalogue", "model_choice", "to_download",
             "inspect_file", "train_file",
             *dict.fromkeys(block for blocks, _ in RESULTS.values() for block in blocks)]  # fmt: skip

    def poll(seen: dict[str, Any], form: str) -> list[Any]:
        return _answer(desk, dict(seen or {}), read_form(form), shown)

    def cancel(target: str, seen: dict[str, Any], form: str) -> list[Any]:
        desk.queue.cancel(target)
        return poll(seen, form)

    outputs = [c["seen"], *(c[name] for name in shown)]
    gradio_versions.on(c["poll"].click, poll, [c["seen"], c["form"]], outputs)
    gradio_versions.on(c["cancel"].click, cancel, [c["target"], c["seen"], c["form"]], outputs)
    panes.bind(desk, c)


def _answer(desk: Desk, seen: dict[str, Any], form: Mapping[str, Any], shown: list[str]) -> list[Any]:
    """What has changed since this page asked last."""
    told: dict[str, Any] = {}
    jobs = desk.queue.jobs()
    ended = [job for job in jobs if job.state in ENDED and job.kind not in ("look", "models")]
    last = max(ended, key=lambda job: job.ended or 0, default=None)
    told["activity"] = html.activity(desk.queue.active(), last if last and last.state != "done" else None)
    for kind, (blocks, show) in RESULTS.items():
        done = [job for job in ended if job.kind == kind and job.state == "done"]
        if done and seen.get(kind) != done[-1].id:
            seen[kind] = done[-1].id
            told |= dict.fromkeys(blocks, show(done[-1], desk, form))
    if [job.kind for job in ended if job.state == "done" and job.kind in ("make", "mend")][-1:] == ["make"]:
        told["make_mended"] = ""  # what was mended was another one
    models = desk.models(anew=desk.trouble is not None and not seen.get("greeted"))
    trouble = desk.trouble  # it may be over in the next moment
    if models is None and trouble is not None and seen.get("models") != trouble.id:
        seen["models"] = trouble.id
        told["models"] = told["catalogue"] = html.failure(trouble)
    state = json.dumps([[row["name"], row["ready"], row["download_bytes"]] for row in models or ()])
    if models is not None and seen.get("models") != state:
        seen["models"] = state
        told["models"] = html.model_choice(models, desk.chosen(form.get("picked")))
        told["catalogue"] = html.model_table(models, places=desk.host.local)
        shown_now = next((row for row in models if row["name"] == form.get("choice")), models[0])
        told["model_choice"] = gr.update(choices=[row["name"] for row in models], value=shown_now["name"])
        told["to_download"] = html.to_download(shown_now, places=desk.host.local)
    if not seen.get("greeted"):  # the page was built when the process began; settings have changed since
        seen["greeted"] = True
        values = {option.key: desk.host.option(option.key) for option in OPTIONS}
        told |= {control: gr.update(value=values[key]) for key, control in DEFAULTS.items()}
        told |= {key: gr.update(value=value) for key, value in values.items()}
    if not seen.get("listed") or {"make_result", "convert_result", "inspect_mended"} & set(told):
        files = list(desk.host.loras())
        first = {} if seen.get("listed") or not files else {"value": files[0]}  # later, the user's choice stays
        seen["listed"] = bool(files)
        for name in ("inspect_file", "train_file"):
            told[name] = gr.update(choices=files, **first)
    return [seen, *(told.get(name, gr.update()) for name in shown)]


def read_form(text: str) -> dict[str, Any]:
    """What the page's script has gathered; {} for nothing, or for nonsense."""
    try:
        form = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return form if isinstance(form, dict) else {}


def refused(function: Callable[..., Any]) -> Callable[..., str]:
    """Run a handler of one output: "" where it went well, else the refusal for the page."""

    def run(*values: Any) -> str:
        try:
            with disk.explained("That could not be done"):
                function(*values)
        except UserError as error:
            return html.error(str(error))
        return ""

    return run
