"""What the WebUI may ask of the engine: one line of JSON, held against a table before anything is done.

The WebUI's process may be older than the engine's: an extension that is updated while the WebUI runs has its old half
in memory and its new half on disk. What the two do not both know is refused in words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from i2l_ext.converters.dialects import DIALECTS
from i2l_ext.converters.errors import UserError

Test = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _path(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value and Path(value).is_absolute()


def _number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 53


def _prose(value: Any) -> bool:
    return isinstance(value, str)


def _list(of: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _words(value: Any) -> bool:
    """A command and its arguments, as a program can be given them."""
    return value != [] and _list(lambda word: isinstance(word, str) and "\0" not in word)(value)


def _maybe(test: Test) -> Test:
    return lambda value: value is None or test(value)


ORDER: Mapping[str, Test] = {
    "pictures": _list(_path), "weights": _maybe(_list(_number)), "name": _prose, "folder": _path, "model": _text,
    "strength": _number, "dialect": lambda value: isinstance(value, str) and value in DIALECTS, "dtype": _maybe(_text),
    "rank": _maybe(_whole), "blocks": _maybe(_text), "kinds": _maybe(_text),
    "overwrite": lambda value: isinstance(value, bool), "description": _prose, "activation_text": _prose, "host": _text,
}  # fmt: skip
"""The fields of pipeline.Order."""

COMMON: Mapping[str, Test] = {
    "kind": _text, "folder": _path, "outcome": _path, "device": _maybe(_text), "precision": _maybe(_text),
    "memory": _maybe(_text), "cache_bytes": _maybe(_whole), "draw": lambda value: isinstance(value, bool),
    "source": _maybe(_text),
}  # fmt: skip
"""Fields that a request may have."""

NEEDED: Mapping[str, Mapping[str, Test]] = {
    "make": {"order": lambda value: isinstance(value, dict)},
    "look": {"pictures": _list(_path), "numbers": _maybe(_list(_whole))},
    "inspect": {"file": _path, "folder": _path},
    "curve": {"file": _path},
    "mend": {"file": _path, "consumer": _text, "output": _path, "folder_of_export": _path},
    "doctor": {"host": _text},
    "models": {},
    "download": {"model": _text},
    "verify": {"model": _text},
    "convert": {"arguments": _words},
    "export": {"arguments": _words},
}
"""By kind of job, the fields that a request must have besides."""


def read(line: bytes) -> dict[str, Any]:
    """The request. Raises UserError where it is none that this engine understands."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise _strange("the request") from None
    if not isinstance(request, dict) or not isinstance(request.get("kind"), str):
        raise _strange("the request")
    needed = NEEDED.get(request["kind"], {})
    _hold(request, {**COMMON, **needed}, needed)
    if request["kind"] == "make":
        _hold(request["order"], ORDER, ("pictures", "folder", "name", "model"))
        for name in request["order"].keys() - ORDER.keys():
            raise _strange(f"'{name}'")
    return request


def _hold(said: Mapping[str, Any], tests: Mapping[str, Test], needed: Iterable[str]) -> None:
    for name, test in tests.items():
        if (name in said or name in needed) and not test(said.get(name)):
            raise _strange(f"'{name}'")


def _strange(what: str) -> UserError:
    return UserError(
        f"The engine does not understand {what}. If the extension was updated while the WebUI ran, restart the WebUI."
    )
