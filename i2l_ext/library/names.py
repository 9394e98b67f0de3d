"""The names that a LoRA may have, on every system and in every WebUI."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from i2l_ext.converters.errors import UserError

LONGEST = 100
"""Characters of a name: with folder and suffixes the path stays within the limit of Windows."""

_FOREIGN = re.compile(r"[^A-Za-z0-9._-]")
_ENDINGS = re.compile(r"\.(safetensors|ckpt|pt|json|png|preview)$", re.IGNORECASE)
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10))}

_FAULTS: tuple[tuple[Callable[[str], object], str], ...] = (
    (lambda name: not name, "is empty"),
    (lambda name: len(name) > LONGEST, f"has more than {LONGEST} characters"),
    (lambda name: name[0] in ".-" or name[-1] == ".", "begins with '.' or '-', or ends with '.'"),
    (lambda name: ".." in name, "has two dots in a row"),
    (lambda name: name.lower() == "none", "means 'no LoRA' to a WebUI"),
    (lambda name: name.split(".")[0].lower() in _RESERVED, "is reserved by Windows"),
    (_ENDINGS.search, "ends like the name of a file"),
)


def check_name(name: str) -> str:
    """``name``, if every host and every system accepts it as a stem. Raises UserError, which suggests a better one."""
    fault: str | None
    if foreign := _FOREIGN.search(name):
        fault = f"contains {_describe(foreign[0])}"
    else:
        fault = next((fault for test, fault in _FAULTS if test(name)), None)
    if fault is None:
        return name
    raise UserError(
        f"The name {name[:LONGEST]!a} {fault}. Take letters, digits, '.', '_' and '-', for example {clean_name(name)}."
    )


def clean_name(text: str) -> str:
    """A name like ``text`` that check_name accepts."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"\.{2,}", ".", _FOREIGN.sub("-", text))
    while (shorter := _ENDINGS.sub("", text.strip(".-")[: LONGEST - 10])) != text:
        text = shorter
    if not text or any(test(text) for test, _ in _FAULTS):
        return f"lora-{text}".rstrip("-")
    return text


def suggest_name(paths: Sequence[Path | str]) -> str:
    """A name for a LoRA of these pictures: that of the first one, or of its folder if a folder was given."""
    first = Path(paths[0]).resolve()
    return clean_name(first.name if first.is_dir() else first.stem)


def _describe(char: str) -> str:
    """``char`` for a message; one that may look like another, or is invisible, by its Unicode name."""
    if char.isascii() and char.isprintable() and char != " ":
        return f"'{char}'"
    return {" ": "a space"}.get(char, f"U+{ord(char):04X} {unicodedata.name(char, '(a control code)')}")
