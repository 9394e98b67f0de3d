"""Newer packages for the engine's own process, beside a WebUI's Python whose packages are not to be touched."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".private" / "site-packages"
STAMP = "i2l-python.txt"
"""Names the Python for which ``install.py`` filled the folder: another one has no use for it."""


def use() -> None:
    """Put the private folder first on the path, where it was made for the Python that runs."""
    stamp = FOLDER / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8").splitlines()[0] == sys.prefix:
        sys.path.insert(0, str(FOLDER))
