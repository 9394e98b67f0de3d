"""Folders of this machine are nobody's business but its own: they are taken out of what a client gets to see."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from i2l_ext.engine.process import ROOT

_ANY = re.compile(r"(?<![\w.:/!])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:\"'<>|,;]+[/\\])+")
"""The folders of a whole path, with blanks in none of them; not those of a URL or of a ``#!`` line."""


def own() -> list[Path]:
    """Folders that tell of this machine or its user, whatever the host is."""
    home = [Path(os.path.expanduser("~"))] if os.path.expanduser("~") != "~" else []  # noqa: PTH111 - Path.home raises
    return [ROOT, Path(sys.prefix), Path(tempfile.gettempdir()), Path.cwd(), *home]


def hide(value: Any, folders: Iterable[Path], *, others: bool = False) -> Any:
    """``value`` (text, or JSON with texts in it) with paths below ``folders`` told from there on; of ``others``, too,
    only the file's name is left. Pictures (data URIs) are let alone."""
    names = {str(form) for folder in folders for form in (folder.absolute(), folder.resolve())}
    roots = sorted((name for name in names if len(Path(name).parts) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(root) + r"(?:[/\\]+|(?![\w.-]))" for root in roots) or r"(?!)")

    def clean(value: Any) -> Any:
        if isinstance(value, str) and not value.startswith("data:"):
            text = pattern.sub("", value)
            return _ANY.sub("", text) if others else text
        if isinstance(value, Mapping):
            return {key: clean(entry) for key, entry in value.items()}
        return [clean(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    return clean(value)
