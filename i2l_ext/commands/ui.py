"""``i2l ui``: the tab in a browser, without a WebUI."""

from __future__ import annotations

import argparse
from pathlib import Path

from i2l_ext.converters.errors import UserError


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    ui = subparsers.add_parser("ui", help="open the tab in a browser, without a WebUI", description="The tab.")
    ui.add_argument("--host", default="127.0.0.1", help="address to serve at (default: this machine only)")
    ui.add_argument("--port", type=int, default=7860, help="port (default: 7860)")
    ui.add_argument("--lora-dir", type=Path, help="where LoRAs are written (default: the WebUI's models/Lora)")
    ui.add_argument("--api", action="store_true", help="serve the HTTP interface too (docs/http.md)")
    ui.add_argument(
        "--auth", action="append", default=[], metavar="USER:PASSWORD", help="ask for this; may be repeated"
    )
    ui.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="HOST",
        help="a name that a proxy in front goes by; may be repeated",
    )
    ui.add_argument("--browser", action="store_true", help="open the browser")
    ui.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve the page until it is stopped."""
    try:
        from i2l_ext.webui import standalone
    except ImportError as error:
        if (error.name or "").split(".")[0] != "gradio":
            raise
        raise UserError("The page needs gradio. Install it: pip install gradio, or run: python install.py ui") from None
    pairs = [text.partition(":") for text in args.auth]
    if any(not (user and mark and password) for user, mark, password in pairs):
        raise UserError("Give --auth as USER:PASSWORD.")
    auth = [(user, password) for user, _, password in pairs]
    return standalone.serve_page(
        args.host, args.port, lora_folder=args.lora_dir and args.lora_dir.absolute(), api=args.api, auth=auth,
        names=args.name, browser=args.browser,
    )  # fmt: skip
