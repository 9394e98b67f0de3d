"""The panes of the tab: their controls, and what their buttons ask the desk for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from i2l_ext.converters.dialects import DIALECTS
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.trainers import TRAINERS
from i2l_ext.webui import access, disk, gradio_versions, html
from i2l_ext.webui.curve import curve
from i2l_ext.webui.service import Desk, Wish, picture_list
from i2l_ext.webui.settings import DTYPES, HUBS, OPTIONS
from i2l_ext.webui.texts import WORDS, label
from i2l_ext.webui.uploads import received, upload_folders

RANK = 16
"""To train, at first."""

RANKS = (WORDS["as_made"], "4", "8", "16", "32", "64")


FAR = "Folders are taken only on a page that was opened on this machine, as localhost or 127.0.0.1."


def _button(c: dict[str, Any], id: str, variant: str = "secondary", **options: Any) -> None:
    c[id] = gr.Button(label(id), variant=variant, elem_id=f"i2l_{id}", **options)


def _add(c: dict[str, Any], kind: Callable[..., Any], id: str, **options: Any) -> None:
    c[id] = kind(label=label(id), elem_id=f"i2l_{id}", **options)


def _html(c: dict[str, Any], id: str, content: str = "") -> None:
    c[id] = gr.HTML(content, elem_id=f"i2l_{id}")


def make(desk: Desk, c: dict[str, Any]) -> None:
    """Pictures, model, name; and what comes of it."""
    with gr.Row(elem_id="i2l_make_columns"):
        with gr.Column():
            _html(c, "files", html.drop_zone("files", "drop_pictures", accept="image/*", many=True))
            if desk.host.local:
                with gr.Row(elem_id="i2l_from_folder"):
                    _add(c, gr.Textbox, "server_folder", lines=1, scale=4)
                    _button(c, "add_folder", scale=1, min_width=120)
            _html(c, "tray", html.tray([]))
            _html(c, "models", html.quiet("looking"))
        with gr.Column():
            _add(c, gr.Textbox, "name", lines=1)
            _html(c, "saved_as")
            with gr.Accordion(WORDS["advanced"], open=False, elem_id="i2l_advanced"):
                _add(c, gr.Slider, "strength", minimum=0.1, maximum=2.0, step=0.05, value=1.0)
                with gr.Row():
                    _add(c, gr.Dropdown, "rank", choices=list(RANKS), value=RANKS[0])
                    _add(c, gr.Dropdown, "dialect", choices=list(DIALECTS), value=desk.host.option("i2l_dialect"))
                    _add(c, gr.Dropdown, "dtype", choices=list(DTYPES), value=desk.host.option("i2l_dtype"))
                _add(c, gr.Textbox, "subfolder", lines=1, value=desk.host.option("i2l_subfolder"))
                _add(c, gr.Textbox, "description", lines=2)
                _add(c, gr.Textbox, "activation", lines=1)
            _button(c, "make", "primary")
            _html(c, "make_error")
            _html(c, "make_mended")
            _html(c, "make_result")


def train(desk: Desk, c: dict[str, Any]) -> None:
    """From a LoRA to the folder that a trainer starts from."""
    with gr.Row():
        _add(c, gr.Dropdown, "train_file", choices=[], value=None)
        _add(c, gr.Dropdown, "trainer", choices=list(TRAINERS), value=next(iter(TRAINERS)))
        _add(c, gr.Slider, "train_rank", minimum=1, maximum=128, step=1, value=RANK)
    with gr.Row():
        _button(c, "curve")
        _button(c, "export", "primary")
    _html(c, "train_error")
    _html(c, "train_curve")
    _html(c, "train_result")


def inspect(desk: Desk, c: dict[str, Any]) -> None:
    """What a LoRA is, and how to say it otherwise."""
    with gr.Row():
        with gr.Column():
            _add(c, gr.Dropdown, "inspect_file", choices=[], value=None)
            _html(c, "inspect_drop", html.drop_zone("inspect_drop", "drop_lora", accept=".safetensors"))
        with gr.Column():
            _button(c, "inspect", "primary")
            _add(c, gr.Dropdown, "convert_to", choices=list(DIALECTS), value=next(iter(DIALECTS)))
            _button(c, "convert")
            _button(c, "reload_list")
    _html(c, "inspect_error")
    _html(c, "inspect_mended")
    _html(c, "convert_result")
    _html(c, "inspect_result")


def models(desk: Desk, c: dict[str, Any]) -> None:
    """What is on disk."""
    _html(c, "catalogue", html.quiet("looking"))
    with gr.Row():
        _add(c, gr.Dropdown, "model_choice", choices=[], value=None)
        _add(c, gr.Dropdown, "source", choices=list(HUBS), value=next(iter(HUBS)))
        _button(c, "download", "primary")
        _button(c, "verify")
    _html(c, "to_download")
    _html(c, "models_error")
    _html(c, "models_result")
    _button(c, "doctor")
    _html(c, "doctor_result")


def settings(desk: Desk, c: dict[str, Any]) -> None:
    """The settings, where there is no WebUI to show them. They are kept as soon as they are changed."""
    values = desk.host.stored.read()
    for option in OPTIONS:
        if option.folder and not desk.host.local:
            continue
        kind, arguments = component(option)
        id = option.key.replace("i2l_", "i2l_setting_")
        c[option.key] = kind(label=option.label, info=option.tip, value=values[option.key], elem_id=id, **arguments)
    _html(c, "settings_note")


def component(option: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The gradio component for an option, and its arguments."""
    if option.choices:
        return gr.Dropdown, {"choices": list(option.choices)}
    if isinstance(option.default, bool):
        return gr.Checkbox, {}
    return (gr.Textbox, {"lines": 1}) if isinstance(option.default, str) else (gr.Number, {})


PANES: Mapping[str, Callable[[Desk, dict[str, Any]], None]] = {
    "make": make, "train": train, "inspect": inspect, "models": models, "settings": settings,
}  # fmt: skip
"""In the order of their tabs."""


def _near(headers: Mapping[str, str]) -> bool:
    """Whether the page was opened by this machine's own name, not through a tunnel."""
    try:
        access.Gate(access.NEAR).check("POST", headers)
    except access.Refused:
        return False
    return True


def _pictures_in(folder: str, headers: Mapping[str, str]) -> list[Path]:
    """The pictures of a folder on this machine. Offered only where the page is bound to this machine."""
    from i2l_ext import images

    if not _near(headers):
        raise UserError(FAR)
    path = Path((folder or "").strip())
    if not folder or not path.is_absolute() or not path.is_dir():
        raise UserError("Give the whole path of a folder on this machine.")
    return images.collect([path])


def slider(value: object) -> int:
    """A rank, from wherever it comes."""
    return int(value) if isinstance(value, (int, float)) and value >= 1 else RANK


def bind(desk: Desk, c: dict[str, Any]) -> None:
    """What every button does."""
    from i2l_ext.webui.tab import read_form, refused

    def tray(ids: list[str], form: Mapping[str, Any], turn: object) -> str:
        old, weights = picture_list({"pictures": form.get("pictures", [])})
        kept = dict(zip(old, weights, strict=True))
        seen = desk.look(list(dict.fromkeys([*old, *ids])))
        cards = [{**one, "weight": kept.get(one["id"], 1.0)} for one in seen if "picture" in one]
        return html.tray(cards, [one["error"] for one in seen if "error" in one], turn)

    def redraw(take: Callable[[], list[str]], form: str, turn: object = "") -> Any:
        try:
            with disk.explained("The pictures could not be taken in"):
                return tray(take(), read_form(form), turn)
        except UserError as error:
            held = read_form(form)
            try:
                return tray([], held, turn) + html.error(str(error))
            except UserError:
                return html.tray([], [str(error)], turn)

    def drop(uploaded: str, form: str) -> Any:
        told = read_form(uploaded)
        paths = told.get("paths")
        claimed = [path for path in paths if isinstance(path, str)] if isinstance(paths, list) else []
        take = lambda: [desk.uploads.take(path) for path in received(claimed, upload_folders())]  # noqa: E731
        return redraw(take, form, told.get("turn"))

    def add_folder(request: gr.Request, folder: str, form: str) -> Any:
        return redraw(lambda: [desk.uploads.take(path) for path in _pictures_in(folder, request.headers)], form)

    gradio_versions.on(c["take"].click, drop, [c["uploaded"], c["form"]], [c["tray"]])
    if "server_folder" in c:
        gradio_versions.on(c["add_folder"].click, add_folder, [c["server_folder"], c["form"]], [c["tray"]])

    def saved_as(name: str, subfolder: str) -> str:
        if not (name or "").strip():
            return ""
        try:
            with disk.explained("The LoRA folder cannot be read"):
                stem = desk.saved_name(name, subfolder or "")
        except UserError as error:
            return html.error(str(error))
        return html.quiet("saved_as", f"{stem}.safetensors")

    for control in (c["name"], c["subfolder"]):
        gradio_versions.on(control.change, saved_as, [c["name"], c["subfolder"]], [c["saved_as"]])

    def start(form: str, name: str, strength: float, rank: str, *rest: str) -> None:
        gathered = read_form(form)
        pictures, weights = picture_list(gathered)
        wish = Wish(pictures, name or "", str(gathered.get("model") or desk.chosen()), weights, strength,
                    int(rank) if rank in RANKS[1:] else None, *(text or "" for text in rest))  # fmt: skip
        desk.make(wish)

    names = ("form", "name", "strength", "rank", "dialect", "dtype", "subfolder", "description", "activation")
    gradio_versions.on(c["make"].click, refused(start), [c[name] for name in names], [c["make_error"]])

    def which(shown: str | None, form: str = "") -> tuple[Path, str]:
        dropped = read_form(form).get("dropped")
        if isinstance(dropped, str) and dropped:
            [path] = received([dropped], upload_folders())
            return path, path.name
        if not shown:
            raise UserError("Choose a LoRA of the list, or drop one.")
        return desk.lora(shown), shown

    def download(name: str, source: str, form: str) -> None:
        desk.download(name, HUBS.get(source, source), agreed=read_form(form).get("agreed") == name)

    def mend(target: str) -> None:
        id, _, consumer = (target or "").partition(" ")
        desk.mend(id, consumer)

    ins, trs = [c["inspect_file"], c["form"]], [c["train_file"]]
    acts: Mapping[str, tuple[Callable[..., Any], list[Any], str]] = {
        "inspect": (lambda s, d: desk.inspect(*which(s, d)), ins, "inspect_error"),
        "convert": (lambda s, d, to: desk.convert(*which(s, d), to), [*ins, c["convert_to"]], "inspect_error"),
        "curve": (lambda s: desk.curve(*which(s)), trs, "train_error"),
        "export": (
            lambda s, t, r: desk.export(*which(s), t, r), [*trs, c["trainer"], c["train_rank"]], "train_error"
        ),
        "mend": (mend, [c["target"]], "mend_error"),
        "doctor": (desk.doctor, [], "models_error"),
        "download": (download, [c["model_choice"], c["source"], c["form"]], "models_error"),
        "verify": (desk.verify, [c["model_choice"]], "models_error"),
    }  # fmt: skip
    for id, (act, inputs, told) in acts.items():
        gradio_versions.on(c[id].click, refused(act), inputs, [c[told]])

    def to_download(name: str) -> Any:
        row = next((row for row in desk.models() or () if row["name"] == name), None)
        return html.to_download(row, places=desk.host.local) if row else gr.update()

    gradio_versions.on(c["model_choice"].change, to_download, [c["model_choice"]], [c["to_download"]])
    gradio_versions.on(c["train_file"].input, refused(acts["curve"][0]), trs, [c["train_error"]])

    def redraw_curve(rank: float, seen: dict[str, Any]) -> Any:
        job = desk.queue.find((seen or {}).get("curve", ""))
        return curve(job, slider(rank)) if job and job.result else gr.update()

    gradio_versions.on(c["train_rank"].change, redraw_curve, [c["train_rank"], c["seen"]], [c["train_curve"]])

    def reload_list() -> list[Any]:
        files = list(desk.host.loras())
        return [gr.update(choices=files)] * 2

    gradio_versions.on(c["reload_list"].click, reload_list, [], [c["inspect_file"], c["train_file"]])

    shown = [option for option in OPTIONS if option.key in c]

    def keep(request: gr.Request, *values: Any) -> str:
        held = desk.host.stored.read()
        new = {option.key: option.sound(value) for option, value in zip(shown, values, strict=True)}
        far = not _near(request.headers)
        if far and any(option.folder and new[option.key] != held[option.key] for option in shown):
            return html.error(FAR)
        if new == {key: held[key] for key in new}:
            return ""  # the page itself has put them there
        try:
            with disk.explained("The settings could not be kept"):
                desk.host.stored.write(new)
        except UserError as error:
            return html.error(str(error))
        return html.quiet("saved")

    for option in shown if desk.host.alone else ():
        inputs = [c[other.key] for other in shown]
        gradio_versions.on(c[option.key].change, keep, inputs, [c["settings_note"]])
