"""What the engine is asked: one line of JSON, checked before anything is done.

The WebUI's process may be older than the engine's: an extension that is updated while the WebUI runs has its old half
in memory and its new half on disk. What the two do not both know is refused in words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from i2l_ext.converters.errors import UserError
from i2l_ext.requests import PROTOCOL, REQUESTS, EngineOptions, Request, bad_request

FIELDS = frozenset({"protocol", "kind", "request", "options", "folder", "outcome", "draw"})


@dataclass(frozen=True)
class Message:
    """A request and how to compute it. ``folder`` is the job's own; ``outcome`` is the file for what comes of it;
    ``draw``: a LoRA of the miniature is to be drawn with."""

    request: Request
    options: EngineOptions
    folder: Path | None = None
    outcome: Path | None = None
    draw: bool = False


def read_message(line: bytes) -> Message:
    """The message in a line. Raises UserError where it is none that this engine understands."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        raise bad_request("the request") from None
    if not isinstance(said, Mapping) or not isinstance(said.get("kind"), str):
        raise bad_request("the request")
    if said.get("protocol") != PROTOCOL:
        raise bad_request("this version of the WebUI's half")
    for name in said:
        if name not in FIELDS:
            raise bad_request(repr(name[:80]))
    if said["kind"] not in REQUESTS:
        raise UserError("The engine does not know this kind of job. Restart the WebUI.", "bad_request")
    draw = said.get("draw", False)
    if not isinstance(draw, bool):
        raise bad_request("'draw'")
    return Message(
        REQUESTS[said["kind"]].from_json(said.get("request", {})),
        EngineOptions.from_json(said.get("options", {})),
        _path(said, "folder"),
        _path(said, "outcome"),
        draw,
    )


def outcome_of(line: bytes) -> Path | None:
    """Where the outcome of a message goes, also of one that is refused; None where that cannot be read."""
    with suppress(ValueError, RecursionError, AttributeError, UserError):
        return _path(json.loads(line), "outcome")
    return None


def _path(said: Mapping[str, Any], name: str) -> Path | None:
    value = said.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or "\0" in value or not Path(value).is_absolute():
        raise bad_request(repr(name))
    return Path(value)
