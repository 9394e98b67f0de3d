"""The pane for several styles at once: a LoRA for each picture, or for each picture and sub-folder of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.job import Job
from i2l_ext.library import free_name, names, names_below
from i2l_ext.requests import BatchRequest
from i2l_ext.service.disk_errors import explain_disk_errors
from i2l_ext.service.service import Service, tray_pictures
from i2l_ext.service.uploads import split_crops
from i2l_ext.webui import gradio_versions
from i2l_ext.webui.access import opened_locally
from i2l_ext.webui.markup import Markup, element, error_line, join, quiet_line, value, word
from i2l_ext.webui.page_form import read_form
from i2l_ext.webui.texts import CONTROLS

BLOCKS = ("batch_error", "batch_activity", "batch_result")


def batch_pane(service: Service, c: dict[str, Any]) -> None:
    """A folder, or the pictures of Make; and the LoRAs that are made of them."""
    gr.HTML(quiet_line("batch_line"))
    if service.host.is_local:
        c["batch_folder"] = gr.Textbox(label=CONTROLS["batch_folder"].label, lines=1, elem_id="i2l_batch_folder")
    with gr.Row():
        for id in ("each_of_folder", "each_of_tray") if service.host.is_local else ("each_of_tray",):
            c[id] = gr.Button(CONTROLS[id].label, variant="primary", elem_id=f"i2l_{id}")
    for id in BLOCKS:
        c[id] = gr.HTML("", elem_id=f"i2l_{id}")


def bind_batch(service: Service, c: dict[str, Any]) -> None:
    """Bind the buttons of the pane."""

    def of_tray(form: str, subfolder: str) -> str:
        def act() -> None:
            told = read_form(form)
            ids, crops = split_crops(tray_pictures(told)[0])
            numbered = [f"style-{number}" for number in range(1, len(ids) + 1)]
            start_batch(service, service.uploads.paths(ids), numbered, str(told.get("model") or ""), subfolder, crops)

        return _told(act)

    def of_folder(request: gr.Request, folder: str, form: str, subfolder: str) -> str:
        def act() -> None:
            path = checked_folder(folder, opened_locally(request.headers))
            start_batch(service, [path], None, str(read_form(form).get("model") or ""), subfolder)

        return _told(act)

    error = [c["batch_error"]]
    gradio_versions.on(c["each_of_tray"].click, of_tray, [c["form"], c["subfolder"]], error)
    if "batch_folder" in c:
        inputs = [c["batch_folder"], c["form"], c["subfolder"]]
        gradio_versions.on(c["each_of_folder"].click, of_folder, inputs, error)


def checked_folder(folder: str, local: bool) -> Path:
    """A folder of this machine. Raises UserError, also where the page was not opened on it."""
    if not local:
        raise UserError("Folders are taken only on a page that was opened on this machine, as localhost or 127.0.0.1.")
    path = Path((folder or "").strip())
    if not folder or not path.is_absolute() or not path.is_dir():
        raise UserError("Give the whole path of a folder on this machine.")
    return path


def start_batch(
    service: Service, pictures: Sequence[Path], named: Sequence[str] | None, model: str = "", subfolder: str = "",
    crops: tuple[str, ...] | None = None,
) -> Job:  # fmt: skip
    """A LoRA for each name of ``named``, one for each picture and its square of ``crops``; None: for each picture and
    sub-folder of the one folder, where what was made before is skipped. Raises UserError."""
    if not pictures:
        raise UserError("There is no picture yet. Drop some in Make.")
    model = model or service.models.choose()
    if service.models.rows():
        service.models.find(model)
    folder = service.targets.folder(subfolder or "").absolute()
    with service.targets.lock:
        taken, free = names_below(service.host.lora_folder()), list[str]()
        for name in named or ():
            free.append(free_name(names.clean_name(name), taken))
            taken.add(f"{free[-1].lower()}.safetensors")
        request = BatchRequest(
            tuple(path.absolute() for path in pictures), folder=folder, model=model, names=tuple(free) or None,
            crops=crops, dialect=service.host.option("i2l_dialect"), host=service.host.name or None,
        )  # fmt: skip
        request.validate()
        return service.submit(pictures[0].name if named is None else f"{len(free)}", request)


def show_batch(job: Job) -> Markup:
    """The LoRAs that were made, and why others were not."""
    result = job.result
    rows = [
        element("li", element("img", src=one.get("picture", ""), alt=""), element("b", value(one["name"])), " ",
                element("code", one["prompt"], class_="i2l-prompt"))
        for one in result["made"]
    ]  # fmt: skip
    rest = [element("li", element("b", value(one["name"])), " ", value(one["reason"])) for one in result["skipped"]]
    head = join(word("batch_made"), " ", value(f"{len(result['made'])} / {result['asked']}"))
    return element(
        "article", element("h4", head), element("ul", rows, rest, class_="i2l-shelf"), class_="i2l-result i2l-wide",
        data_i2l_id=job.id, data_i2l_made=1,
    )  # fmt: skip


def _told(act: Any) -> str:
    try:
        with explain_disk_errors("That could not be done"):
            act()
    except UserError as error:
        return error_line(str(error))
    return ""
