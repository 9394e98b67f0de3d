"""The controls of the tab, pane by pane. What they do is in handlers.py, their texts in texts.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from i2l_ext.converters.key_formats import KEY_FORMATS
from i2l_ext.image_plugins import accepted_types
from i2l_ext.requests import ExportRequest
from i2l_ext.service.service import Service
from i2l_ext.service.settings import AS_MADE, DTYPE_CHOICES, KEY_FORMAT_CHOICES, SETTINGS, Setting
from i2l_ext.webui import consent_views, html
from i2l_ext.webui.batch_pane import batch_pane
from i2l_ext.webui.library_pane import library_pane
from i2l_ext.webui.markup import quiet_line
from i2l_ext.webui.texts import CONTROLS, WORDS

Components = dict[str, Any]
"""By id; in the page the id is ``i2l_<id>``."""

TRAIN_RANK = 16
"""The rank to train that is chosen when the page opens."""

MIN_COLUMN = 300
"""Pixels below which columns stand one below the other."""

RANKS = (AS_MADE, "4", "8", "16", "32", "64")
TRAINERS = tuple(ExportRequest.fields()["trainer"].info.choices)


def _button(c: Components, id: str, variant: str = "secondary", **options: Any) -> None:
    c[id] = gr.Button(CONTROLS[id].label, variant=variant, elem_id=f"i2l_{id}", **options)


def _add(c: Components, kind: Callable[..., Any], id: str, **options: Any) -> None:
    c[id] = kind(label=CONTROLS[id].label, elem_id=f"i2l_{id}", **options)


def _html(c: Components, id: str, content: str = "") -> None:
    c[id] = gr.HTML(content, elem_id=f"i2l_{id}")


def make_pane(service: Service, c: Components) -> None:
    """Pictures, model, name; and the LoRA that is made of them."""
    option = service.host.option
    with gr.Row(elem_id="i2l_make_columns"):
        with gr.Column(min_width=MIN_COLUMN):
            _html(c, "files", html.drop_zone("files", "drop_pictures", accept=",".join(accepted_types()), many=True))
            _html(c, "tray", html.tray([]))
            _html(c, "crop")
            if service.host.is_local:
                with gr.Accordion(CONTROLS["server_folder"].label, open=False, elem_id="i2l_from_folder"):
                    _add(c, gr.Textbox, "server_folder", lines=1)
                    _button(c, "add_folder")
            _html(c, "models", quiet_line("looking"))
        with gr.Column(min_width=MIN_COLUMN):
            _add(c, gr.Textbox, "name", lines=1)
            _html(c, "saved_as")
            with gr.Accordion(WORDS["advanced"], open=False, elem_id="i2l_advanced"):
                _add(c, gr.Slider, "strength", minimum=0.1, maximum=2.0, step=0.05, value=1.0)
                with gr.Row():
                    _add(c, gr.Dropdown, "rank", choices=list(RANKS), value=AS_MADE)
                    _add(c, gr.Dropdown, "key_format", choices=list(KEY_FORMAT_CHOICES), value=option("i2l_key_format"))
                    _add(c, gr.Dropdown, "dtype", choices=list(DTYPE_CHOICES), value=option("i2l_dtype"))
                _add(c, gr.Textbox, "subfolder", lines=1, value=option("i2l_subfolder"))
                _add(c, gr.Textbox, "description", lines=2)
                _add(c, gr.Textbox, "activation_text", lines=1)
                _add(c, gr.Checkbox, "grey", value=False)
            _button(c, "make", "primary")
            for id in ("make_error", "make_offer", "make_activity", "make_fetched", "make_repaired", "make_result"):
                _html(c, id)


def train_pane(service: Service, c: Components) -> None:
    """From a LoRA to a trainer's start folder."""
    with gr.Row():
        _add(c, gr.Dropdown, "train_file", choices=[], value=None)
        _add(c, gr.Dropdown, "trainer", choices=list(TRAINERS), value=TRAINERS[0])
        _add(c, gr.Slider, "train_rank", minimum=1, maximum=128, step=1, value=TRAIN_RANK)
    with gr.Row():
        _add(c, gr.Textbox, "train_caption", lines=1)
        if "server_folder" in c:  # the page takes folders of this machine
            _add(c, gr.Textbox, "train_pictures", lines=1)
    with gr.Row():
        _button(c, "curve")
        _button(c, "export", "primary")
    for id in ("train_error", "train_activity", "train_run", "train_result", "train_curve"):
        _html(c, id)


def inspect_pane(service: Service, c: Components) -> None:
    """What a LoRA is, and writing it in another key format."""
    with gr.Row():
        with gr.Column(min_width=MIN_COLUMN):
            _add(c, gr.Dropdown, "inspect_file", choices=[], value=None)
            _html(c, "inspect_drop", html.drop_zone("inspect_drop", "drop_lora", accept=".safetensors"))
        with gr.Column(min_width=MIN_COLUMN):
            _button(c, "inspect", "primary")
            _add(c, gr.Dropdown, "convert_to", choices=list(KEY_FORMATS), value=next(iter(KEY_FORMATS)))
            _button(c, "convert")
            _button(c, "reload_list")
    for id in ("inspect_error", "inspect_activity", "inspect_repaired", "convert_result", "inspect_result"):
        _html(c, id)


def models_pane(service: Service, c: Components) -> None:
    """What is downloaded, downloads, and the bug report."""
    for id in ("models_error", "models_offer", "models_activity", "models_fetched", "models_result"):
        _html(c, id)
    _html(c, "catalogue", quiet_line("looking"))
    _html(c, "diffsynth", consent_views.diffsynth_section(service))
    _button(c, "doctor")
    _html(c, "doctor_result")


def settings_pane(service: Service, c: Components) -> None:
    """The settings, where there is no WebUI to show them. They are saved as soon as they are changed."""
    for setting in SETTINGS:
        if setting.folder and not service.host.is_local:
            continue
        kind, arguments = setting_component(setting)
        c[setting.key] = kind(
            label=setting.label, info=setting.tip, value=service.host.option(setting.key),
            elem_id=setting.key.replace("i2l_", "i2l_setting_"), **arguments,
        )  # fmt: skip
    _html(c, "settings_note")


def setting_component(setting: Setting) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The gradio component for a setting, and its arguments."""
    if setting.choices:
        return gr.Dropdown, {"choices": list(setting.choices)}
    if isinstance(setting.default, bool):
        return gr.Checkbox, {}
    return (gr.Textbox, {"lines": 1}) if isinstance(setting.default, str) else (gr.Number, {})


PANES: Mapping[str, Callable[[Service, Components], None]] = {
    "make": make_pane, "batch": batch_pane, "library": library_pane, "train": train_pane,
    "inspect": inspect_pane, "models": models_pane,
    "settings": settings_pane,
}  # fmt: skip
"""In the order of their tabs."""
