"""Words of a command line, as a user types them into a shell."""

from __future__ import annotations

import re
import shlex
import sys


def shell_word(text: str) -> str:
    """A path as the shell of this system takes it: on Windows both, cmd and PowerShell."""
    quoted = text if re.fullmatch(r"[\w:/\\.-]+", text) else f'"{text}"'  # no name on Windows has a quote
    return quoted if sys.platform == "win32" else shlex.quote(text)
