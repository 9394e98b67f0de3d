"""What differs between gradio 3.41, 4.40 and 6; nothing else asks for a version."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

MAX_UPLOAD = 4 << 30
"""Bytes of a file that is dropped on the stand-alone page: a LoRA is the largest."""


def _accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options whose names the function has in this version."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def on(event: Callable[..., Any], function: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Bind a handler that answers at once: beside gradio's queue, without its spinner, in no list of endpoints."""
    quiet = {"queue": False, "show_progress": "hidden"}
    hidden = {"api_visibility": "private"} if "api_visibility" in inspect.signature(event).parameters else {}
    named = {} if hidden else {"api_name": False, **_accepted(event, {"show_api": False})}
    event(function, inputs=list(inputs), outputs=list(outputs), **quiet, **hidden, **named)


def launch(
    blocks: Callable[[Any], object], *, title: str, css: str, head: str, options: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Build a page with ``blocks`` and serve it; (the FastAPI application, the Blocks). Returns at once."""
    look = {"css": css, "head": head, "delete_cache": (3600, 24 * 3600)}
    page = gr.Blocks(title=title, analytics_enabled=False, **_accepted(gr.Blocks.__init__, look))
    with page:
        blocks(page)
    known = _accepted(
        page.launch,
        {**look, **options, "max_file_size": MAX_UPLOAD, "show_api": False, "footer_links": [], "ssr_mode": False},
    )
    return page.launch(prevent_thread_lock=True, quiet=True, **known)[0], page
