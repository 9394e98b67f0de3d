"""The pane for several styles at once: a LoRA for each group of pictures, for each picture of Make, or for each picture
and sub-folder of a folder."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.job import Job
from i2l_ext.library.names import suggest_name, with_number
from i2l_ext.service.batches import Group, make_each_of_folder, make_groups
from i2l_ext.service.disk_errors import explain_disk_errors
from i2l_ext.service.service import Service, tray_pictures
from i2l_ext.service.uploads import received, upload_folders
from i2l_ext.webui import gradio_versions, html
from i2l_ext.webui.access import opened_locally
from i2l_ext.webui.markup import Markup, button, element, error_line, join, quiet_line, value, word
from i2l_ext.webui.page_form import answer_errors, read_form
from i2l_ext.webui.texts import CONTROLS, WORDS

BLOCKS = ("batch_error", "batch_activity", "batch_result")


def batch_pane(service: Service, c: dict[str, Any]) -> None:
    """Groups of pictures, a folder, or the pictures of Make; and the LoRAs that are made of them."""
    gr.HTML(quiet_line("batch_line"))
    zone = html.drop_zone("batch_files", "drop_style", accept="image/*", many=True)
    c["batch_files"] = gr.HTML(zone, elem_id="i2l_batch_files")
    c["groups"] = gr.HTML(show_groups([]), elem_id="i2l_groups")
    _button(c, "each_of_groups", "primary")
    with gr.Row():
        if service.host.is_local:
            c["batch_folder"] = gr.Textbox(label=CONTROLS["batch_folder"].label, lines=1, elem_id="i2l_batch_folder")
            _button(c, "each_of_folder")
        _button(c, "each_of_tray")
    for id in BLOCKS:
        c[id] = gr.HTML("", elem_id=f"i2l_{id}")


def _button(c: dict[str, Any], id: str, variant: str = "secondary") -> None:
    c[id] = gr.Button(CONTROLS[id].label, variant=variant, elem_id=f"i2l_{id}")


def bind_batch(service: Service, c: dict[str, Any]) -> None:
    """Bind the buttons of the pane."""

    def of_groups(form: str, subfolder: str) -> None:
        told = read_form(form)
        make_groups(service, read_groups(told), model=_model(told), subfolder=subfolder or "")

    def of_tray(form: str, subfolder: str) -> None:
        told = read_form(form)
        ids, _ = tray_pictures(told)
        groups = [(f"style-{number}", [id]) for number, id in enumerate(ids, 1)]
        make_groups(service, groups, model=_model(told), subfolder=subfolder or "")

    def of_folder(request: gr.Request, folder: str, form: str, subfolder: str) -> str:
        def act() -> None:
            path = checked_folder(folder, opened_locally(request.headers))
            make_each_of_folder(service, path, model=_model(read_form(form)), subfolder=subfolder or "")

        return answer_errors(act)()

    error = [c["batch_error"]]
    for id, act in {"each_of_groups": of_groups, "each_of_tray": of_tray}.items():
        gradio_versions.on(c[id].click, answer_errors(act), [c["form"], c["subfolder"]], error)
    if "batch_folder" in c:
        inputs = [c["batch_folder"], c["form"], c["subfolder"]]
        gradio_versions.on(c["each_of_folder"].click, of_folder, inputs, error)
    take = lambda uploaded, form: take_group(service, read_form(uploaded), read_form(form))  # noqa: E731
    gradio_versions.on(c["take_group"].click, take, [c["uploaded"], c["form"]], [c["groups"]])


def _model(form: Mapping[str, Any]) -> str | None:
    return str(form.get("model") or "") or None


def read_groups(form: Mapping[str, Any]) -> list[Group]:
    """Names and ids of the groups in the page. Raises UserError."""
    groups = form.get("groups", [])
    for one in groups if isinstance(groups, list) else [None]:
        name, ids = (one.get("name"), one.get("pictures")) if isinstance(one, Mapping) else (None, None)
        if not isinstance(ids, list) or not all(isinstance(text, str) for text in (name, *ids)):
            raise UserError("The list of pictures is damaged. Reload the page.")
    return [(one["name"], one["pictures"]) for one in groups]


def take_group(service: Service, sent: Mapping[str, Any], form: Mapping[str, Any]) -> str:
    """The groups with what was uploaded: in the group ``sent["group"]``, from 1, or in a new one."""
    errors: list[str] = []
    try:
        groups = [(name, list(ids)) for name, ids in read_groups(form)]
    except UserError as error:
        return show_groups([], [str(error)], sent.get("turn"))
    try:
        with explain_disk_errors("The pictures could not be taken in"):
            claimed = sent.get("paths")
            paths = received(claimed if isinstance(claimed, list) else (), upload_folders())
            number = sent.get("group")
            if type(number) is not int or not 1 <= number <= len(groups):
                groups.append((_free_name(suggest_name(paths), {name for name, _ in groups}) if paths else "", []))
                number = len(groups)
            ids = groups[number - 1][1]
            ids += [id for path in paths if (id := service.uploads.take(path)) not in ids]
    except UserError as error:
        errors.append(str(error))
    shown = []
    for name, ids in groups:
        try:
            seen = service.preview(ids)
        except UserError as error:
            errors.append(str(error))
            continue
        errors += [one["error"] for one in seen if "error" in one]
        shown.append((name, [one for one in seen if "picture" in one]))
    return show_groups([one for one in shown if one[1]], errors, sent.get("turn"))


def _free_name(name: str, taken: Collection[str]) -> str:
    return next(free for number in itertools.count(1) if (free := with_number(name, number)) not in taken)


def show_groups(
    groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], errors: Iterable[str] = (), turn: object = ""
) -> Markup:
    """The groups: a name and ``{id, picture}`` of each picture. ``turn`` as in the tray of Make."""
    cards = [_group(number, name, pictures) for number, (name, pictures) in enumerate(groups, 1)]
    return element("div", cards or quiet_line("no_groups"), list(map(error_line, errors)), data_i2l_turn=turn)


def _group(number: int, name: str, pictures: Sequence[Mapping[str, Any]]) -> Markup:
    named = element(
        "label", word("style_name"), " ", element("input", type="text", value=name, maxlength=200), class_="i2l-style"
    )
    remove = button("remove_style", "remove_group", "", aria_label=f"{WORDS['remove_style']} {name}")
    cards = [
        element("li", element("img", src=one["picture"], alt=""), element(
            "button", "×", type="button", class_="i2l-remove", data_i2l="remove", title=WORDS["remove"],
            aria_label=f"{WORDS['remove']} {at}",
        ), class_="i2l-card", data_i2l_id=one["id"])
        for at, one in enumerate(pictures, 1)
    ]  # fmt: skip
    more = html.drop_zone("batch_files", "drop_more", accept="image/*", many=True, place=f"group {number}")
    return element(
        "section", element("div", named, remove, class_="i2l-buttons"), element("ul", cards, class_="i2l-tray"), more,
        class_="i2l-group", aria_label=name,
    )  # fmt: skip


def checked_folder(folder: str, local: bool) -> Path:
    """A folder of this machine. Raises UserError, also where the page was not opened on it."""
    if not local:
        raise UserError("Folders are taken only on a page that was opened on this machine, as localhost or 127.0.0.1.")
    path = Path((folder or "").strip())
    if not folder or not path.is_absolute() or not path.is_dir():
        raise UserError("Give the whole path of a folder on this machine.")
    return path


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
