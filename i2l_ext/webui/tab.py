"""The tab: its layout, and the button that every page polls with."""

from __future__ import annotations

from typing import Any

import gradio as gr

from i2l_ext.service.service import Service
from i2l_ext.service.settings import SETTINGS
from i2l_ext.webui import gradio_versions, html, job_views
from i2l_ext.webui.handlers import bind_panes
from i2l_ext.webui.languages import LANGUAGES
from i2l_ext.webui.markup import translations
from i2l_ext.webui.page_form import read_form
from i2l_ext.webui.panes import PANES, Components
from i2l_ext.webui.texts import WORDS
from i2l_ext.webui.updates import changes, updated_controls


def build_tab(service: Service) -> Components:
    """Build the whole tab inside the gr.Blocks that is open; its components by id."""
    standalone = service.host.settings_file is not None
    note = "standalone" if standalone else None if service.host.applies_loras else "not_applied"
    c: Components = {}
    with gr.Column(elem_id="i2l"):
        place = str(service.host.lora_folder()) if standalone and service.host.is_local else ""
        heading = html.heading(note, place, LANGUAGES)
        for id, content in (("heading", heading), ("activity", job_views.overview([], {}))):
            c[id] = gr.HTML(content, elem_id=f"i2l_{id}")
        with gr.Tabs(elem_id="i2l_panes"):
            for id, pane in PANES.items():
                if id != "settings" or standalone:
                    with gr.Tab(WORDS[f"pane_{id}"], elem_id=f"i2l_pane_{id}"):
                        pane(service, c)
        with gr.Group(elem_id="i2l_hidden"):
            for id in ("form", "target", "uploaded"):
                c[id] = gr.Textbox(value="", label=id, elem_id=f"i2l_{id}")
            for id in ("poll", "take", "take_group", "act"):
                c[id] = gr.Button(id, elem_id=f"i2l_{id}")
            c["tips"] = gr.HTML(html.tips(), elem_id="i2l_tips")
            c["taken"] = gr.HTML("", elem_id="i2l_taken")
            c["words"] = gr.HTML(translations(service.host.language()))
    c["seen"] = gr.State({})
    for component in c.values():
        component.do_not_save_to_config = True
    _bind_polls(service, c)
    bind_panes(service, c)
    return c


def _bind_polls(service: Service, c: Components) -> None:
    controls = [*(setting.key for setting in SETTINGS if setting.key in c), *updated_controls()]

    def poll(seen: dict[str, Any], form: str) -> list[Any]:
        return answer_poll(service, dict(seen or {}), form, controls)

    outputs = [c["seen"], *(c[name] for name in controls)]
    gradio_versions.on(c["poll"].click, poll, [c["seen"], c["form"]], outputs)


def answer_poll(service: Service, seen: dict[str, Any], form: str, controls: list[str]) -> list[Any]:
    """``seen`` brought up to date, then for each of ``controls`` its new value or gr.update()."""
    new = changes(service, seen, read_form(form))
    return [seen, *(new.get(name, gr.update()) for name in controls)]
