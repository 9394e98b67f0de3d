"""What the controls of the panes do when they are pressed or changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from i2l_ext.converters.errors import UserError, one_line
from i2l_ext.library.names import NameRefused
from i2l_ext.service.consent import ConsentNeeded
from i2l_ext.service.disk_errors import explain_disk_errors
from i2l_ext.service.service import DownloadNeeded, Service, checked_weights, tray_pictures
from i2l_ext.service.settings import AS_MADE, SETTINGS
from i2l_ext.service.uploads import received, split_crops, upload_folders
from i2l_ext.webui import actions, gradio_versions, html
from i2l_ext.webui.access import opened_locally
from i2l_ext.webui.batch_pane import bind_batch
from i2l_ext.webui.markup import element, error_line, quiet_line
from i2l_ext.webui.page_form import answer_errors, read_form
from i2l_ext.webui.panes import RANKS, TRAIN_RANK, Components
from i2l_ext.webui.rank_curve import show_rank_curve

NOT_LOCAL = "Folders are taken only on a page that was opened on this machine, as localhost or 127.0.0.1."

MAKE_FIELDS = ("strength", "rank", "key_format", "dtype", "description", "activation_text", "grey")
"""Controls that are named like their field of MakeRequest."""

ASKS_KEPT = 1000
"""How many of the questions that pages asked are known again."""


def bind_panes(service: Service, c: Components) -> None:
    """Bind the handlers of all panes."""
    _bind_pictures(service, c)
    _bind_make(service, c)
    _bind_jobs(service, c)
    _bind_lists(service, c)
    _bind_settings(service, c)
    bind_batch(service, c)


def slider_rank(value: object) -> int:
    """A rank from the slider or from the page's script."""
    return int(value) if isinstance(value, (int, float)) and value >= 1 else TRAIN_RANK


def folder_pictures(folder: str, headers: Mapping[str, str]) -> list[Path]:
    """The pictures of a folder on this machine. Raises UserError, also where the page was not opened locally."""
    from i2l_ext import images

    if not opened_locally(headers):
        raise UserError(NOT_LOCAL)
    path = Path((folder or "").strip())
    if not folder or not path.is_absolute() or not path.is_dir():
        raise UserError("Give the whole path of a folder on this machine.")
    return images.collect([path])


def _bind_pictures(service: Service, c: Components) -> None:
    def tray(ids: list[str], form: Mapping[str, Any], turn: object) -> str:
        old, weights = tray_pictures({"pictures": form.get("pictures", [])})
        kept = dict(zip(old, weights, strict=True))
        seen = service.preview(list(dict.fromkeys([*old, *ids])))
        cards = [{**one, "weight": kept.get(one["id"], 1.0)} for one in seen if "picture" in one]
        return html.tray(cards, [one["error"] for one in seen if "error" in one], turn)

    def redraw(take: Callable[[], list[str]], form: str, turn: object = "") -> str:
        try:
            with explain_disk_errors("The pictures could not be taken in"):
                return tray(take(), read_form(form), turn)
        except UserError as error:
            try:
                return tray([], read_form(form), turn) + error_line(str(error))
            except UserError:
                return html.tray([], [str(error)], turn)

    def drop(uploaded: str, form: str) -> str:
        sent = read_form(uploaded)
        paths = sent.get("paths")
        claimed = [path for path in paths if isinstance(path, str)] if isinstance(paths, list) else []
        take = lambda: [service.uploads.take(path) for path in received(claimed, upload_folders())]  # noqa: E731
        return redraw(take, form, sent.get("turn"))

    def add_folder(request: gr.Request, folder: str, form: str) -> str:
        return redraw(lambda: [service.uploads.take(path) for path in folder_pictures(folder, request.headers)], form)

    gradio_versions.on(c["take"].click, drop, [c["uploaded"], c["form"]], [c["tray"]])
    if "server_folder" in c:
        gradio_versions.on(c["add_folder"].click, add_folder, [c["server_folder"], c["form"]], [c["tray"]])


def name_told(service: Service, name: object, subfolder: object) -> str:
    """Where a LoRA of that name will be saved, or why it cannot be."""
    if not isinstance(name, str) or not name.strip():
        return ""
    try:
        with explain_disk_errors("The LoRA folder cannot be read"):
            return html.saved_as_line(service.targets.likely_file(name, str(subfolder or "")))
    except NameRefused as error:
        return html.name_line(error)
    except UserError as error:
        return error_line(str(error))


def _bind_make(service: Service, c: Components) -> None:
    def saved_as(name: str, subfolder: str) -> str:
        return name_told(service, name, subfolder)

    for control in (c["name"], c["subfolder"]):
        gradio_versions.on(control.change, saved_as, [c["name"], c["subfolder"]], [c["saved_as"]])

    def make(form: str, name: str, subfolder: str, *values: Any) -> list[Any]:
        """What is told beside the button: an error, an offer to download the model; and beside the name."""
        gathered = read_form(form)
        fields: dict[str, Any] = {
            key: None if value in ("", AS_MADE) else value for key, value in zip(MAKE_FIELDS, values, strict=True)
        }
        fields["rank"] = int(fields["rank"]) if fields["rank"] in RANKS else None
        model = str(gathered.get("model") or "") or None
        try:
            with explain_disk_errors("That could not be done"):
                pictures, shares = tray_pictures(gathered)
                ids, crops = split_crops(pictures)
                service.make(ids, name=name or "", model=model, subfolder=subfolder or "", ask=True, crops=crops,
                             weights=checked_weights(shares), **fields)  # fmt: skip
        except NameRefused as error:
            return ["", "", html.name_line(error)]
        except DownloadNeeded as error:
            return ["", actions.offer_download(service, error.model, "make", then_make=True)["make_offer"], gr.update()]
        except ConsentNeeded as error:
            service.panes[service.consents.look(error.model).id] = "make"
        except UserError as error:
            return [error_line(str(error)), "", gr.update()]
        return ["", "", gr.update()]

    inputs = [c[name] for name in ("form", "name", "subfolder", *MAKE_FIELDS)]
    gradio_versions.on(c["make"].click, make, inputs, [c["make_error"], c["make_offer"], c["saved_as"]])


def _bind_jobs(service: Service, c: Components) -> None:
    """The buttons that start a job."""

    def chosen(shown: str | None, form: str = "") -> tuple[Path, str]:
        dropped = read_form(form).get("dropped")
        if isinstance(dropped, str) and dropped:
            [path] = received([dropped], upload_folders())
            return path, path.name
        if not shown:
            raise UserError("Choose a LoRA of the list, or drop one.")
        return service.lora(shown), shown

    def export(request: gr.Request, file: str, trainer: str, rank: object, caption: str, folder: str = "") -> str:
        def start() -> None:
            pictures = folder_pictures(folder, request.headers) if folder and folder.strip() else []
            prompt = one_line(caption) if caption and caption.strip() else None
            service.export(*chosen(file), trainer, slider_rank(rank), pictures, prompt)

        return answer_errors(start)()

    inspected, trained = [c["inspect_file"], c["form"]], [c["train_file"]]
    written = [*trained, *(c[id] for id in ("trainer", "train_rank", "train_caption", "train_pictures") if id in c)]
    gradio_versions.on(c["export"].click, export, written, [c["train_error"]])
    starts: Mapping[str, tuple[Callable[..., Any], list[Any], str]] = {
        "inspect": (lambda file, form: service.inspect(*chosen(file, form)), inspected, "inspect_error"),
        "convert": (
            lambda file, form, to: service.convert(*chosen(file, form), to), [*inspected, c["convert_to"]],
            "inspect_error",
        ),
        "curve": (lambda file: service.rank_curve(*chosen(file)), trained, "train_error"),
        "doctor": (service.doctor, [], "models_error"),
    }  # fmt: skip
    for id, (start, inputs, told) in starts.items():
        gradio_versions.on(c[id].click, answer_errors(start), inputs, [c[told]])
    gradio_versions.on(c["train_file"].input, answer_errors(starts["curve"][0]), trained, [c["train_error"]])

    controls = actions.acted_controls()

    taken: deque[str] = deque(maxlen=ASKS_KEPT)

    def act(request: gr.Request, target: str) -> list[Any]:
        ask = str(read_form(target).get("ask", ""))[:64]
        told: Mapping[str, Any] = {}
        if ask not in taken:  # the page asks again until it is told that it was heard
            taken.extend([ask] if ask else [])
            told = actions.act(service, target, opened_here=opened_locally(request.headers))
        return [element("i", data_i2l_taken=ask), *(told.get(name, gr.update()) for name in controls)]

    gradio_versions.on(c["act"].click, act, [c["target"]], [c["taken"], *(c[name] for name in controls)])


def _bind_lists(service: Service, c: Components) -> None:
    """What changes on the page without a job."""

    def redraw_curve(rank: float, seen: dict[str, Any]) -> Any:
        job = service.queue.find((seen or {}).get("curve", ""))
        return show_rank_curve(job, slider_rank(rank)) if job and job.result else gr.update()

    gradio_versions.on(c["train_rank"].change, redraw_curve, [c["train_rank"], c["seen"]], [c["train_curve"]])

    def reload_list() -> list[Any]:
        files = list(service.loras())
        return [gr.update(choices=files) for _ in range(2)]  # one for each: gradio empties it

    gradio_versions.on(c["reload_list"].click, reload_list, [], [c["inspect_file"], c["train_file"]])


def _bind_settings(service: Service, c: Components) -> None:
    """Save the settings of the pane as soon as one is changed."""
    file = service.host.settings_file
    if file is None:
        return
    shown = [setting for setting in SETTINGS if setting.key in c]

    def keep(request: gr.Request, *values: Any) -> str:
        held = file.read()
        new = {one.key: one.valid_or_default(value) for one, value in zip(shown, values, strict=True)}
        far = not opened_locally(request.headers)
        if far and any(one.folder and new[one.key] != held[one.key] for one in shown):
            return error_line(NOT_LOCAL)
        if new == {key: held[key] for key in new}:
            return ""  # the page itself has put the values there
        try:
            with explain_disk_errors("The settings could not be saved"):
                file.write(new)
        except UserError as error:
            return error_line(str(error))
        return quiet_line("saved")

    for setting in shown:
        inputs = [c[other.key] for other in shown]
        gradio_versions.on(c[setting.key].change, keep, inputs, [c["settings_note"]])
