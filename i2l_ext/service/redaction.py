"""Takes the folders of this machine out of what a client sees."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from i2l_ext.engine.process import ROOT

_FOLDERS = re.compile(r"(?<![\w.:/!])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:\"'<>|,;]+[/\\])+")
"""The folders of an absolute path without blanks; not those of a URL or of a ``#!`` line."""


def private_folders() -> list[Path]:
    """Folders whose paths tell something of this machine or its user, in any host."""
    home = [Path(os.path.expanduser("~"))] if os.path.expanduser("~") != "~" else []  # noqa: PTH111 - Path.home raises
    return [ROOT, Path(sys.prefix), Path(tempfile.gettempdir()), Path.cwd(), *home]


def redact_paths(value: Any, folders: Iterable[Path], *, others: bool = False) -> Any:
    """``value`` (text, or JSON with texts in it) with paths below ``folders`` shortened to their part below; with
    ``others``, every other absolute path to its file name. Pictures (data URIs) are not changed."""
    names = {str(form) for folder in folders for form in (folder.absolute(), folder.resolve())}
    roots = sorted((name for name in names if len(Path(name).parts) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(root) + r"(?:[/\\]+|(?![\w.-]))" for root in roots) or r"(?!)")

    def clean(value: Any) -> Any:
        if isinstance(value, str) and not value.startswith("data:"):
            text = pattern.sub("", value)
            return _FOLDERS.sub("", text) if others else text
        if isinstance(value, Mapping):
            return {key: clean(entry) for key, entry in value.items()}
        return [clean(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    return clean(value)
