"""The tab in a WebUI: one desk for the process, however often its page is reloaded."""

from __future__ import annotations

from functools import cache
from typing import Any

from i2l_ext.webui import host
from i2l_ext.webui.texts import WORDS


@cache
def desk() -> Any:
    from i2l_ext.webui.service import Desk

    return Desk(host.WebUI())


def register() -> None:
    """Tell the WebUI what to call."""
    host.register(_tabs, _settings, _started)


def _tabs() -> list[tuple[Any, str, str]]:
    import gradio as gr

    from i2l_ext.webui.tab import build

    with gr.Blocks(analytics_enabled=False) as blocks:
        build(desk())
    return [(blocks, WORDS["title"], "i2l")]


def _settings() -> None:
    from i2l_ext.webui.panes import component
    from i2l_ext.webui.settings import OPTIONS

    rows = {}
    for option in OPTIONS:
        kind, arguments = component(option)
        rows[option.key] = (option.default, option.label, kind, arguments, option.tip)
    host.add_settings(rows)


def _started(demo: Any, app: Any) -> None:
    from importlib.util import find_spec

    from i2l_ext.webui import alive

    alive.add(app)
    if desk().host.api and find_spec("i2l_ext.webui.api"):
        from i2l_ext.webui import api

        api.add(app, desk(), host.credentials())
