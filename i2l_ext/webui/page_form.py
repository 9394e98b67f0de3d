"""What the page's script sends beside gradio's values, and how a refusal is answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from i2l_ext.converters.errors import UserError
from i2l_ext.service.disk_errors import explain_disk_errors
from i2l_ext.webui.markup import error_line


def read_form(text: str) -> dict[str, Any]:
    """What the page's script has gathered; {} where there is nothing, or no JSON object."""
    try:
        form = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return form if isinstance(form, dict) else {}


def answer_errors(function: Callable[..., Any]) -> Callable[..., str]:
    """A handler of one output: "" where ``function`` went well, else the error as HTML."""

    def run(*values: Any) -> str:
        try:
            with explain_disk_errors("That could not be done"):
                function(*values)
        except UserError as error:
            return error_line(str(error))
        return ""

    return run
