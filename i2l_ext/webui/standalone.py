"""The tab without a WebUI: a page and a server of its own."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware

from i2l_ext.converters.errors import UserError
from i2l_ext.engine import queue
from i2l_ext.engine.process import ROOT
from i2l_ext.webui import alive, gradio_versions
from i2l_ext.webui.access import NEAR, Door, Gate
from i2l_ext.webui.host import LOCAL, Alone
from i2l_ext.webui.service import Desk
from i2l_ext.webui.tab import LANGUAGES, build
from i2l_ext.webui.texts import WORDS


def asset(name: str) -> str:
    """A file that a WebUI loads from the checkout, and a wheel holds beside this module."""
    for path in (ROOT / name, Path(__file__).with_name("assets") / Path(name).name):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise UserError(f"{name} is missing from this installation. Install it again.")


def serve(
    address: str, port: int, *, lora_folder: Path | None = None, api: bool = False,
    auth: Sequence[tuple[str, str]] = (), names: Sequence[str] = (), command: Sequence[str] | None = None,
    browser: bool = False,
) -> tuple[Any, Desk]:  # fmt: skip
    """Start the page; its Blocks and its desk. Returns at once. ``names``: what it is also called, as by a proxy."""
    state = queue.state_folder()
    desk = Desk(Alone(state, lora_folder=lora_folder, local=address in LOCAL, api=api), state, command)
    words = {code: json.loads(asset(f"localizations/{code}.json")) for code in LANGUAGES if code != "en"}
    told = json.dumps(words, ensure_ascii=False).replace("</", "<\\/")
    head = f"<script>window.i2lWords = {told};</script><script>{asset('javascript/image_to_lora.js')}</script>"
    options = {"server_name": address, "server_port": port, "inbrowser": browser, "auth": list(auth) or None}
    gate = Gate({*NEAR, address, *names, *(() if address in LOCAL else _own_names())})
    options["app_kwargs"] = {"middleware": [Middleware(Door, gate)]}
    app, page = gradio_versions.launch(
        lambda _: build(desk), title=WORDS["title"], css=asset("style.css"), head=head, options=options
    )
    alive.add(app)
    if api:
        from i2l_ext.webui import api as interface

        interface.add(app, desk, list(auth))
    return page, desk


def _own_names() -> tuple[str, str]:
    """What this machine is called in its network."""
    name = socket.gethostname()
    return name, f"{name}.local"


def run(address: str, port: int, **options: Any) -> int:
    """Serve until the user stops it."""
    try:
        page, desk = serve(address, port, **options)
    except OSError as error:
        raise UserError(f"The page cannot be served at {address}:{port}: {error}. Choose another --port.") from None
    if address not in LOCAL and not options.get("auth"):
        print("Whoever reaches this address can use the page. Add --auth USER:PASSWORD.", file=sys.stderr)
    print(f"Image to LoRA is at {page.local_url} (stop it with Ctrl-C)", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        for job in desk.queue.active():
            desk.queue.cancel(job.id)
