"""The tab in a WebUI: one Service for the process, however often the page is reloaded."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

from i2l_ext.webui.hosts import webui
from i2l_ext.webui.texts import WORDS


@cache
def webui_service() -> Any:
    """The Service of this process."""
    from i2l_ext.service.service import Service
    from i2l_ext.webui.hosts.running import running_host

    return Service(running_host())


def register() -> None:
    """Tell the WebUI what to call."""
    webui.register_callbacks(_tabs, _settings, _started)


def generation_script() -> Any:
    """The script class for ``<i2l:...>`` in prompts, with its network registered; None where a WebUI has no such
    modules."""
    if not (find_spec("modules.extra_networks") and find_spec("modules.scripts")):
        return None
    from i2l_ext.webui.hosts import generation
    from i2l_ext.webui.hosts.running import running_host

    host = running_host()
    by_pipeline = generation.PipelineNetwork() if host.runs_pipelines else None
    webui.register_network(by_pipeline or generation.BranchNetwork(host.applies_loras))
    return generation.BranchScript


def _tabs() -> list[tuple[Any, str, str]]:
    import gradio as gr

    from i2l_ext.webui.tab import build_tab

    with gr.Blocks(analytics_enabled=False) as blocks:
        build_tab(webui_service())
    return [(blocks, WORDS["title"], "i2l")]


def _settings() -> None:
    from i2l_ext.service.settings import SETTINGS
    from i2l_ext.webui.panes import setting_component

    webui.add_settings({one.key: (one.default, one.label, *setting_component(one), one.tip) for one in SETTINGS})


def _started(demo: Any, app: Any) -> None:
    from i2l_ext.webui.alive_route import add_alive_route

    add_alive_route(app)
    host = webui_service().host
    if host.serves_api and find_spec("i2l_ext.webui.api"):
        from i2l_ext.webui import api

        api.add_api(app, webui_service(), host.credentials())
