"""What a command found goes into docs/trust.md, in place of what it found last time."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "trust.md"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def record(section: str, text: str, *, script: str) -> None:
    """Print ``text``, and put it between the section's marks, or at its end where there are none yet."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    where = f"Python {platform.python_version()}, {os.cpu_count()} cores shared with other work, {memory:.0f} GB"
    command = " ".join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]])
    mark = f"<!-- {section.lower()}: written by its command -->"
    block = f"{mark}\n`{command}`, {datetime.now(timezone.utc):%Y-%m-%d}, {where}\n\n{text.strip()}\n{mark}"
    print(block)
    page = PAGE.read_text(encoding="utf-8")
    if mark in page:
        page = re.sub(f"{re.escape(mark)}.*{re.escape(mark)}", lambda _: block, page, flags=re.DOTALL)
    else:
        page = re.sub(
            rf"^## {section}\n(.*?)(?=^## |\Z)",
            lambda found: f"## {section}\n{found[1].rstrip()}\n\n{block}\n\n",
            page,
            flags=re.DOTALL | re.MULTILINE,
        )
    PAGE.write_text(page.rstrip() + "\n", encoding="utf-8")
