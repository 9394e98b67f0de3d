"""What a page is told when it polls: what has changed since it asked last."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from i2l_ext.engine.job import ENDED, Job
from i2l_ext.engine.queue import BRIEF
from i2l_ext.service.service import Service
from i2l_ext.service.settings import SETTINGS
from i2l_ext.webui import html, results
from i2l_ext.webui.handlers import slider_rank
from i2l_ext.webui.rank_curve import show_rank_curve

DEFAULTS = {"i2l_dialect": "dialect", "i2l_dtype": "dtype", "i2l_subfolder": "subfolder"}
"""Setting -> the control of the Make pane that begins with its value."""

Show = Callable[[Job, Service, Mapping[str, Any]], str]

RESULTS: Mapping[str, tuple[tuple[str, ...], Show]] = {
    "make": (("make_result",), lambda job, service, form: results.show_make(job, service.host.settings_file is None)),
    "inspect": (("inspect_result",), lambda job, service, form: results.show_inspect(job)),
    "convert": (("convert_result",), lambda job, service, form: results.show_file(job)),
    "mend": (("make_repaired", "inspect_repaired"), lambda job, service, form: results.show_repair(job)),
    "curve": (("train_curve",), lambda job, service, form: show_rank_curve(job, slider_rank(form.get("rank")))),
    "export": (("train_result",), lambda job, service, form: results.show_export(job)),
    "download": (("models_result",), lambda job, service, form: results.show_download(job)),
    "verify": (("models_result",), lambda job, service, form: results.show_verify(job)),
    "doctor": (("doctor_result",), lambda job, service, form: results.show_doctor(job)),
}
"""Kind of job -> the blocks that show its result, and how."""

LORA_LISTS = ("inspect_file", "train_file")


def updated_controls() -> list[str]:
    """The controls that ``changes`` may change, but for the settings."""
    blocks = dict.fromkeys(block for blocks, _ in RESULTS.values() for block in blocks)
    return [*DEFAULTS.values(), "activity", "models", "catalogue", "model_choice", "to_download", *LORA_LISTS, *blocks]


def changes(service: Service, seen: dict[str, Any], form: Mapping[str, Any]) -> dict[str, Any]:
    """New values by control. ``seen`` is what the page was told before, and is brought up to date."""
    return _jobs(service, seen, form) | _models(service, seen, form) | _greeting(service, seen) | _lists(service, seen)


def _jobs(service: Service, seen: dict[str, Any], form: Mapping[str, Any]) -> dict[str, Any]:
    """What is at work, and results that the page has not shown yet."""
    ended = [job for job in service.queue.jobs() if job.state in ENDED and job.kind not in BRIEF]
    last = max(ended, key=lambda job: job.ended or 0, default=None)
    failed = last if last and last.state != "done" else None
    told: dict[str, Any] = {"activity": html.activity(service.queue.active(), failed)}
    for kind, (blocks, show) in RESULTS.items():
        done = [job for job in ended if job.kind == kind and job.state == "done"]
        if done and seen.get(kind) != done[-1].id:
            seen[kind] = done[-1].id
            told |= dict.fromkeys(blocks, show(done[-1], service, form))
    if [job.kind for job in ended if job.state == "done" and job.kind in ("make", "mend")][-1:] == ["make"]:
        told["make_repaired"] = ""  # it was of another LoRA
    return told


def _models(service: Service, seen: dict[str, Any], form: Mapping[str, Any]) -> dict[str, Any]:
    models = service.models
    rows = models.rows(refresh=models.failed is not None and not seen.get("greeted"))
    failed = models.failed  # read once: another thread may clear it
    if rows is None and failed is not None and seen.get("models") != failed.id:
        seen["models"] = failed.id
        return dict.fromkeys(("models", "catalogue"), html.failure(failed))
    state = json.dumps([[row["name"], row["ready"], row["download_bytes"]] for row in rows or ()])
    if rows is None or seen.get("models") == state:
        return {}
    seen["models"] = state
    places = service.host.is_local
    choice = next((row for row in rows if row["name"] == form.get("choice")), rows[0])
    return {
        "models": html.model_choice(rows, models.choose(form.get("picked"))),
        "catalogue": html.model_table(rows, places=places),
        "model_choice": gr.update(choices=[row["name"] for row in rows], value=choice["name"]),
        "to_download": html.download_facts(choice, places=places),
    }


def _greeting(service: Service, seen: dict[str, Any]) -> dict[str, Any]:
    """The settings as they are now: the page was built when the process began."""
    if seen.get("greeted"):
        return {}
    seen["greeted"] = True
    values = {setting.key: service.host.option(setting.key) for setting in SETTINGS}
    values |= {control: values[key] for key, control in DEFAULTS.items()}
    return {name: gr.update(value=value) for name, value in values.items()}  # one for each: gradio empties it


def _lists(service: Service, seen: dict[str, Any]) -> dict[str, Any]:
    """The lists of LoRAs, when a page opens and when a LoRA was written."""
    written = [seen.get(kind) for kind in ("make", "convert", "mend")]
    if seen.get("listed") and seen.get("written") == written:
        return {}
    files = list(service.loras())
    first = {} if seen.get("listed") or not files else {"value": files[0]}  # later, the user's choice stays
    seen["listed"], seen["written"] = bool(files), written
    return {name: gr.update(choices=files, **first) for name in LORA_LISTS}
