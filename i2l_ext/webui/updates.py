"""What a page is told when it polls: what has changed since it asked last."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from i2l_ext.engine.job import ENDED, Job
from i2l_ext.engine.queue import BRIEF
from i2l_ext.service.model_list import with_disk
from i2l_ext.service.service import Service
from i2l_ext.service.settings import SETTINGS
from i2l_ext.service.targets import WRITES_LORA
from i2l_ext.webui import job_views, model_views, results
from i2l_ext.webui.actions import LORA_LISTS
from i2l_ext.webui.batch_pane import show_batch
from i2l_ext.webui.consent_views import show_set_up, show_setup_plan, show_trust
from i2l_ext.webui.handlers import name_told, slider_rank
from i2l_ext.webui.library_pane import library_news
from i2l_ext.webui.rank_curve import show_rank_curve
from i2l_ext.webui.training_view import show_run

DEFAULTS = {"i2l_key_format": "key_format", "i2l_dtype": "dtype", "i2l_subfolder": "subfolder"}
"""Setting -> the control of the Make pane that begins with its value."""

Show = Callable[[Job, Service, Mapping[str, Any]], str | None]

RESULTS: Mapping[str, tuple[str, Show]] = {
    "make": ("make_result", lambda job, service, form: results.show_make(job, _earlier(service, job), service.host)),
    "inspect": ("inspect_result", lambda job, service, form: results.show_inspect(job)),
    "convert": ("convert_result", lambda job, service, form: results.show_file(job)),
    "repair": ("{pane}_repaired", lambda job, service, form: results.show_repair(job, service.host)),
    "batch": ("batch_result", lambda job, service, form: show_batch(job)),
    "rank": ("library_result", lambda job, service, form: results.show_file(job)),
    "merge": ("library_result", lambda job, service, form: results.show_file(job)),
    "discard": ("library_result", lambda job, service, form: results.show_discard(job)),
    "curve": ("train_curve", lambda job, service, form: show_rank_curve(job, slider_rank(form.get("rank")))),
    "export": ("train_result", lambda job, service, form: results.show_export(job, service.host)),
    "run": ("train_run", lambda job, service, form: show_run(job)),
    "download": ("{pane}_fetched", lambda job, service, form: results.show_download(job)),
    "trust": ("{pane}_offer", lambda job, service, form: show_trust(job, service, pane_of(job, service) or "models")),
    "setup_plan": ("{pane}_offer", lambda job, service, form: show_setup_plan(job, pane_of(job, service) or "models")),
    "setup": ("{pane}_fetched", lambda job, service, form: show_set_up(job)),
    "verify": ("models_result", lambda job, service, form: results.show_verify(job)),
    "doctor": ("doctor_result", lambda job, service, form: results.show_doctor(job)),
}
"""Kind of job -> the block that shows its result, and how; ``{pane}`` is where it was asked for."""

PANES_OF = {
    "make": "make", "repair": "inspect", "inspect": "inspect", "convert": "inspect", "curve": "train",
    "export": "train", "run": "train",
    "download": "models", "verify": "models", "doctor": "models", "rank": "library", "merge": "library",
    "discard": "library", "batch": "batch", "trust": "models", "setup_plan": "models", "setup": "models",
}  # fmt: skip
"""Kind of job -> the pane that shows it at work, unless the service knows where it was asked for. Jobs of other kinds
are shown above all panes."""

ACTIVE_PANES = tuple(dict.fromkeys(PANES_OF.values()))

QUESTIONS = frozenset({"trust", "setup_plan"})
"""Kinds whose results are questions: a page that opens does not ask what another one has asked."""

BLOCKS = (
    "make_offer",
    "models_offer",
    "library_list",
    "library_repaired",
    "make_repaired",
    "inspect_repaired",
    "make_fetched",
    "models_fetched",
)
"""Those of RESULTS with a pane in their names."""

LOST_CODES = ("cut_off", "lost")
"""Codes of jobs that ended with the WebUI."""

EARLIER = 8
"""LoRAs that are listed below the one that was made last."""


def updated_controls() -> list[str]:
    """The controls that ``changes`` may change, but for the settings."""
    blocks = [block for block, _ in RESULTS.values() if "{" not in block]
    activities = [f"{pane}_activity" for pane in ACTIVE_PANES]
    lists = ["activity", *activities, "models", "catalogue", *LORA_LISTS, "saved_as", *BLOCKS]
    return [*DEFAULTS.values(), *lists, *blocks]


def changes(service: Service, seen: dict[str, Any], form: Mapping[str, Any]) -> dict[str, Any]:
    """New values by control. ``seen`` is what the page was told before, and is brought up to date."""
    return (
        _jobs(service, seen, form)
        | _models(service, seen, form)
        | _greeting(service, seen)
        | _lists(service, seen, form)
        | library_news(service, seen)
    )


def pane_of(job: Job, service: Service) -> str | None:
    """The pane of a job; None: it belongs to no pane."""
    return service.panes.get(job.id) or PANES_OF.get(job.kind)


def _jobs(service: Service, seen: dict[str, Any], form: Mapping[str, Any]) -> dict[str, Any]:
    """What is at work, and results that the page has not shown yet."""
    jobs = [job for job in service.queue.jobs() if job.kind not in BRIEF]
    ended = sorted((job for job in jobs if job.state in ENDED), key=lambda job: job.ended or 0)
    active = service.queue.active()
    panes = {job.id: pane_of(job, service) for job in (*jobs, *active)}
    dismissed = form.get("dismissed")
    hidden = set(map(str, dismissed)) if isinstance(dismissed, list) else set()
    told: dict[str, Any] = {"activity": job_views.overview(active, panes)}
    for pane in ACTIVE_PANES:
        asked = max((job.created for job in jobs if panes[job.id] == pane), default=0)
        untold = _untold([job for job in ended if panes[job.id] == pane], asked)
        failed = [job for job in untold if job.id not in hidden]
        at_work = [job for job in active if panes[job.id] == pane]
        told[f"{pane}_activity"] = (
            job_views.activity(at_work, failed, service.log_of, pane) if at_work or failed else ""
        )
    told = {name: value for name, value in told.items() if seen.get(name) != value}
    seen.update(told)
    for kind, (block, show) in RESULTS.items():
        done = [job for job in ended if job.kind == kind and job.state == "done"]
        if done and seen.get(kind) != done[-1].id:
            seen[kind] = done[-1].id
            if kind in QUESTIONS and not seen.get("greeted"):
                continue
            shown = show(done[-1], service, form)
            told |= {} if shown is None else {block.format(pane=panes[done[-1].id]): shown}
    for block, kinds in {"make_repaired": ("make", "repair"), "inspect_repaired": ("inspect", "repair")}.items():
        if [job.kind for job in ended if job.state == "done" and job.kind in kinds][-1:] == [kinds[0]]:
            told[block] = ""  # it was of another LoRA
    return told


def _untold(ended: Sequence[Job], asked: float) -> list[Job]:
    """Of the jobs of a pane, the oldest first: those that did not end well since something was last ``asked`` for (who
    asks again has seen them), and all that a kill or a restart has ended, until they have been done again."""
    done = {(job.kind, job.title): at for at, job in enumerate(ended) if job.state == "done"}
    return [
        job for at, job in enumerate(ended)
        if job.state != "done" and ((job.ended or 0) >= asked or job.code in LOST_CODES)
        and at > done.get((job.kind, job.title), -1)
    ]  # fmt: skip


def _earlier(service: Service, last: Job) -> list[Job]:
    """The LoRAs that were made before, the newest first."""
    made = [job for job in service.queue.jobs() if job.kind == "make" and job.state == "done" and job is not last]
    return sorted(made, key=lambda job: job.ended or 0, reverse=True)[:EARLIER]


def _models(service: Service, seen: dict[str, Any], form: Mapping[str, Any]) -> dict[str, Any]:
    models = service.models
    rows = models.rows(refresh=models.failed is not None and not seen.get("greeted"))
    failed = models.failed  # read once: another thread may clear it
    if rows is None and failed is not None and seen.get("models") != failed.id:
        seen["models"] = failed.id
        return dict.fromkeys(("models", "catalogue"), job_views.failure(failed, "models"))
    fetching = sorted(service.fetching())
    state = json.dumps([[[row["name"], row["ready"], row["download_bytes"]] for row in rows or ()], fetching])
    if rows is None or seen.get("models") == state:
        return {}
    seen["models"] = state
    rows = [with_disk(row) for row in rows]
    return {
        "models": model_views.model_choice(rows, models.choose(form.get("picked")), fetching),
        "catalogue": model_views.model_table(rows, places=service.host.is_local, fetching=fetching),
    }


def _greeting(service: Service, seen: dict[str, Any]) -> dict[str, Any]:
    """The settings as they are now: the page was built when the process began."""
    if seen.get("greeted"):
        return {}
    seen["greeted"] = True
    values = {setting.key: service.host.option(setting.key) for setting in SETTINGS}
    values |= {control: values[key] for key, control in DEFAULTS.items()}
    return {name: gr.update(value=value) for name, value in values.items()}  # one for each: gradio empties it


def _lists(service: Service, seen: dict[str, Any], form: Mapping[str, Any]) -> dict[str, Any]:
    """The lists of LoRAs, when a page opens and when a LoRA was written. One that was made is chosen; after a
    conversion the choice stays. The name that is typed may be taken now."""
    written = [seen.get(kind) for kind in WRITES_LORA]
    if seen.get("listed") and seen.get("written") == written:
        return {}
    files = list(service.loras())
    new = not seen.get("listed") or seen.get("chosen") != seen.get("make")
    first = {"value": files[0]} if files and new else {}
    seen.update(listed=bool(files), written=written, chosen=seen.get("make"))
    service.targets.forget()
    told = {"saved_as": name_told(service, form.get("name"), form.get("subfolder"))} if form.get("name") else {}
    return {name: gr.update(choices=files, **first) for name in LORA_LISTS} | told
