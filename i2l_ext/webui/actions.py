"""What the page's own buttons do: those that stand inside pictures, models, jobs and results (``action_button``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.job import Job
from i2l_ext.service.disk_errors import explain_disk_errors
from i2l_ext.service.model_list import available_hubs, with_disk
from i2l_ext.service.service import Service
from i2l_ext.webui import model_views
from i2l_ext.webui.crop_view import open_crop
from i2l_ext.webui.library_pane import LIBRARY_ACTIONS
from i2l_ext.webui.markup import element, error_line
from i2l_ext.webui.page_form import read_form

OFFERS = ("make", "models")
"""The panes where a download can be offered."""

ELSEWHERE = "Do that on a page that was opened on this machine, as localhost or 127.0.0.1."

AGREE_SECONDS = 60.0
"""For which a page waits for its agreement to be written down: all files are hashed once more."""

LORA_LISTS = ("inspect_file", "train_file")

ERRORS = ("make_error", "train_error", "inspect_error", "models_error", "library_error")

Said = Mapping[str, Any]
Told = Mapping[str, Any]
"""New values by control."""
Action = Callable[[Service, Said], Told]


def acted_controls() -> list[str]:
    """The controls that ``act`` may change."""
    return ["library_list", "crop", *ERRORS, *(f"{pane}_offer" for pane in OFFERS), *LORA_LISTS]


def act(service: Service, text: str, *, opened_here: bool = False) -> Told:
    """Do what a button says: the JSON ``{"action": …}``, with what the script has gathered around it in ``fields``.
    ``opened_here``: on a page that was opened on this machine, which some actions are for alone."""
    said = read_form(text)
    if said.get("action") in HERE_ALONE and not opened_here:
        return {f"{_pane(said)}_error": error_line(ELSEWHERE)}
    action = ACTIONS.get(str(said.get("action")))
    if action is None:
        return {}
    act, error = action
    told = f"{_pane(said)}_error" if error is None else error
    try:
        with explain_disk_errors("That could not be done"):
            return {told: "", **act(service, said)}
    except UserError as refused:
        return {told: error_line(str(refused))}


def _model(said: Said) -> str:
    return str(said.get("model"))


def offer_download(service: Service, model: str, pane: str, *, then_make: bool = False) -> Told:
    """The offer to download a model, in a pane."""
    row = with_disk(service.models.find(model))
    offer = model_views.download_offer(
        row, pane, places=service.host.is_local, then_make=then_make, hubs=available_hubs()
    )
    return {f"{pane}_offer": offer}


def _offer(service: Service, said: Said) -> Told:
    return offer_download(service, _model(said), _pane(said))


def _cancel(service: Service, said: Said) -> Told:
    service.queue.cancel(str(said.get("job")))
    return {}


def _close_offer(service: Service, said: Said) -> Told:
    return {f"{_pane(said)}_offer": ""}


def _fetch(service: Service, said: Said) -> Told:
    """Start a download; where a LoRA is to be made after it, the page then presses that button once more."""
    model, pane = _model(said), _pane(said)
    source, agreed, packed = (_field(said, name) for name in ("source", "agreed", "packed"))
    hub = source[0] if source else "huggingface"
    job = service.download(model, hub, agreed=model in agreed, packed=model in packed)
    service.panes[job.id] = pane
    then = element("i", data_i2l_then="i2l_make", data_i2l_id=job.id) if said.get("make") is True else ""
    return {f"{pane}_offer": then}


def _begins(start: Callable[[Service, Said], Job]) -> Action:
    """The action that starts a job, whose result takes the place of the pane's offer."""

    def action(service: Service, said: Said) -> Told:
        pane = _pane(said)
        service.panes[start(service, said).id] = pane
        return {f"{pane}_offer": ""}

    return action


def _agree(service: Service, said: Said) -> Told:
    """Agree to what the page has shown; where a LoRA is to be made after it, the page then presses that button."""
    job = service.consents.accept(str(said.get("token")))
    service.panes[job.id] = pane = _pane(said)
    try:
        service.queue.wait(job.id, AGREE_SECONDS)
    except TimeoutError:
        return {f"{pane}_offer": ""}
    agreed = job.state == "done" and job.result["agreed"]
    then = element("i", data_i2l_then="i2l_make", data_i2l_id=job.id) if agreed and said.get("make") is True else ""
    return {f"{pane}_offer": then}


def _verify(service: Service, said: Said) -> Told:
    service.verify(_model(said))
    return {}


def _repair(service: Service, said: Said) -> Told:
    service.repair(str(said.get("job")), str(said.get("consumer")))
    return {}


def _vary(service: Service, said: Said) -> Told:
    service.make_variants(
        str(said.get("job")), [float(one) for one in _numbers(said, "strength")],
        [int(one) for one in _numbers(said, "rank")], [int(one) for one in _numbers(said, "twice")],
    )  # fmt: skip
    return {}


def _train(service: Service, said: Said) -> Told:
    service.train(str(said.get("job")))
    return {}


def _choose(service: Service, said: Said) -> Told:
    """Put a LoRA into the lists of the panes that work on one."""
    file = str(said.get("file"))
    service.lora(file)
    files = list(service.loras())
    return {name: gr.update(choices=files, value=file) for name in LORA_LISTS}


ACTIONS: Mapping[str, tuple[Action, str | None]] = {
    "offer": (_offer, None), "cancel": (_cancel, None), "close_offer": (_close_offer, None), "fetch": (_fetch, None),
    "verify": (_verify, "models_error"), "repair": (_repair, None), "vary": (_vary, "make_error"),
    "choose": (_choose, "make_error"), "crop": (open_crop, "make_error"), "train": (_train, "train_error"),
    "look_at_code": (_begins(lambda service, said: service.consents.look(_model(said))), None),
    "withdraw": (_begins(lambda service, said: service.consents.withdraw(_model(said))), None),
    "plan_setup": (_begins(lambda service, said: service.consents.plan_setup()), None),
    "set_up": (_begins(lambda service, said: service.consents.set_up()), None), "agree": (_agree, None),
    **LIBRARY_ACTIONS,
}  # fmt: skip
"""What a button says -> what is done, and the control that tells why not; None: that of the pane it names."""

HERE_ALONE = frozenset({"agree", "withdraw", "set_up"})
"""Actions for those who sit at this machine."""


def _pane(said: Said) -> str:
    pane = said.get("pane")
    return pane if isinstance(pane, str) and f"{pane}_error" in ERRORS else "make"


def _field(said: Said, name: str) -> list[str]:
    """What the fields of that name hold."""
    fields = said.get("fields")
    held = fields.get(name) if isinstance(fields, Mapping) else None
    return [one for one in held if isinstance(one, str)] if isinstance(held, list) else []


def _numbers(said: Said, name: str) -> list[float]:
    try:
        return [float(json.loads(one)) for one in _field(said, name)]
    except (ValueError, TypeError, OverflowError):
        raise UserError("That is no number. Reload the page.") from None
