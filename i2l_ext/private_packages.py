"""Newer packages for the engine's own process, beside a WebUI's Python whose packages are not to be touched."""

import hashlib
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".private" / "site-packages"
PINS = ROOT / "requirements" / "host.txt"
STAMP = "i2l-python.txt"
"""In the folder: for which Python and from which pins ``install.py`` filled it. Another one has no use for it."""


def expected_stamp() -> str:
    """What is to stand there: the prefix and the version of the Python that runs, and the digest of the pins. Raises
    OSError where there are none."""
    digest = hashlib.sha256(b"\0".join((PINS.read_bytes(), sys.version.encode())))
    return "\n".join((sys.prefix, sys.version.replace("\n", " "), digest.hexdigest()))


def stamp(names: Iterable[str]) -> str:
    """What is written there: as expected, and the packages that are in the folder."""
    return "\n".join((expected_stamp(), *names))


def is_current(folder: Path, names: Collection[str] = ()) -> bool:
    """Whether a folder was filled for the Python that runs, from the pins as they are, to its end, and has these
    packages."""
    with suppress(OSError, ValueError):
        written = (folder / STAMP).read_text(encoding="utf-8").split("\n")
        expected = expected_stamp().split("\n")
        return written[: len(expected)] == expected and set(names) <= set(written[len(expected) :])
    return False


def add_to_path() -> None:
    """Put the private folder first on the path, where it fits."""
    if is_current(FOLDER):
        sys.path.insert(0, str(FOLDER))
