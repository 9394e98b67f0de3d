"""What a command found goes where it is read: into RESULTS.md or TRUST.md, in place of what it found last time."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
TRUST = Path(__file__).with_name("TRUST.md")
HEAD = """# Results

Written by the commands themselves; each section says which. The machines are shared and noisy: read the ratios.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def record(title: str, text: str, *, script: str) -> None:
    """Print a result, and put it into RESULTS.md in place of the last one of that title."""
    section = f"## {title}\n\n{_ran(script)}\n\n{text}\n"
    print(section)
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    new = pattern.sub(lambda _: section + "\n", old) if pattern.search(old) else f"{old.rstrip()}\n\n{section}"
    RESULTS.write_text(new.rstrip() + "\n", encoding="utf-8")


def record_trust(section: str, text: str, *, script: str) -> None:
    """Print ``text``, and put it between the marks of that section of TRUST.md, or at its end where there are
    none yet."""
    mark = f"<!-- {section.lower()}: written by its command -->"
    block = f"{mark}\n{_ran(script)}\n\n{text.strip()}\n{mark}"
    print(block)
    page = TRUST.read_text(encoding="utf-8")
    if mark in page:
        page = re.sub(f"{re.escape(mark)}.*{re.escape(mark)}", lambda _: block, page, flags=re.DOTALL)
    else:
        page = re.sub(
            rf"^## {section}\n(.*?)(?=^## |\Z)",
            lambda found: f"## {section}\n{found[1].rstrip()}\n\n{block}\n\n",
            page,
            flags=re.DOTALL | re.MULTILINE,
        )
    TRUST.write_text(page.rstrip() + "\n", encoding="utf-8")


def _ran(script: str) -> str:
    """The command, the day and the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    command = " ".join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]])
    return (
        f"`{command}`, {datetime.now(timezone.utc):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{memory:.0f} GB, Python {platform.python_version()}, torch {version('torch')}"
    )
