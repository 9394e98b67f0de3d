"""The tab without a WebUI: a page and a server of its own."""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.process import ROOT
from i2l_ext.engine.queue import state_folder
from i2l_ext.service.host import LOCAL_ADDRESSES
from i2l_ext.service.service import Service
from i2l_ext.webui import gradio_versions
from i2l_ext.webui.access import LOCAL_NAMES, AccessMiddleware, AccessPolicy
from i2l_ext.webui.alive_route import add_alive_route
from i2l_ext.webui.hosts.standalone import StandaloneHost
from i2l_ext.webui.tab import build_tab
from i2l_ext.webui.texts import WORDS

SCRIPTS = (
    "javascript/image_to_lora.js", "javascript/image_to_lora_crop.js", "javascript/translation.js",
    "javascript/webui_host.js",
)  # fmt: skip


def read_asset(name: str) -> str:
    """The text of a file that a WebUI loads from the checkout. A wheel has it in ``assets`` beside this module."""
    for path in (ROOT / name, Path(__file__).with_name("assets") / Path(name).name):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise UserError(f"{name} is missing from this installation. Install it again.")


def start_page(
    address: str, port: int, *, lora_folder: Path | None = None, api: bool = False,
    auth: Sequence[tuple[str, str]] = (), names: Sequence[str] = (), command: Sequence[str] | None = None,
    browser: bool = False,
) -> tuple[Any, Service]:  # fmt: skip
    """Serve the page, and return at once: its Blocks and its service. ``names``: other host names for it, such as a
    proxy's. ``command``: how the engine is started, for tests. Raises OSError where the port cannot be had."""
    state = state_folder()
    host = StandaloneHost(state, lora_folder=lora_folder, is_local=address in LOCAL_ADDRESSES, serves_api=api)
    service = Service(host, state, command)
    head = "".join(f"<script>{read_asset(name)}</script>" for name in SCRIPTS)
    options = {"server_name": address, "server_port": port, "inbrowser": browser, "auth": list(auth) or None}
    policy = AccessPolicy({*LOCAL_NAMES, address, *names, *(() if host.is_local else _machine_names())})
    options["app_kwargs"] = {"middleware": [Middleware(AccessMiddleware, policy)]}
    app, page = gradio_versions.launch(
        lambda _: build_tab(service), title=WORDS["title"], css=read_asset("style.css"), head=head, options=options
    )
    add_alive_route(app)
    if api:
        from i2l_ext.webui.api import add_api

        add_api(app, service, list(auth))
    return page, service


def _machine_names() -> tuple[str, str]:
    """What this machine is called in its network."""
    name = socket.gethostname()
    return name, f"{name}.local"


def _is_taken(address: str, port: int) -> bool:
    """Whether another program serves there. gradio says of every port that it cannot have only that it found none."""
    try:
        socket.create_server((address, port)).close()
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def serve_page(address: str, port: int, **options: Any) -> int:
    """Serve the page until the user stops it. ``options``: those of ``start_page``. Raises UserError."""
    try:
        page, service = start_page(address, port, **options)
    except OSError as error:
        if _is_taken(address, port):
            line = f"Port {port} is taken, perhaps by your WebUI: choose another, --port {port + 1}."
        else:
            line = f"The page cannot be served at {address}:{port}: {str(error).rstrip('.')}. Choose another --port."
        raise UserError(line) from None
    if address not in LOCAL_ADDRESSES and not options.get("auth"):
        print("Anyone who reaches this address can use the page. Add --auth USER:PASSWORD.", file=sys.stderr)
    print(f"Image to LoRA is at {page.local_url} (stop it with Ctrl-C)", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        for job in service.queue.active():
            service.queue.cancel(job.id)
