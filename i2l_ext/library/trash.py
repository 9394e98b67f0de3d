"""The trash: files leave their folder and can be brought back.

On Linux it is the desktop's, by the specification of freedesktop.org; on macOS the Finder's. Where there is none, or it
lies on another disk, and on Windows, files go into the folder ``.trash`` beside them, under names that no host lists.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from i2l_ext.converters.errors import UserError

OWN, SUFFIX = ".trash", ".trashed"
"""The folder, and what its files' names end with: some hosts list LoRAs in hidden folders, too."""


def discard(files: Sequence[Path]) -> Path:
    """Move files of one folder into the trash; the folder where they are now. Raises UserError where one cannot be
    moved: then those before it are there, and it and the others stay."""
    folder = files[0].parent
    for move in (_to_system, _to_own):
        with suppress(OSError):
            return [move(file) for file in files if file.exists()][-1]
    raise UserError(f"{files[0].name}: cannot be moved out of {folder}. Is it open in another program?")


def _to_system(file: Path) -> Path:
    """Into the trash of the user. Raises OSError where there is none on this disk."""
    return _move(file, Path.home() / ".Trash") if sys.platform == "darwin" else _to_freedesktop(file)


def _to_freedesktop(file: Path) -> Path:
    """The same by the specification of freedesktop.org."""
    if os.name == "nt":
        raise OSError
    root = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "Trash"
    if root.parent.stat().st_dev != file.stat().st_dev:
        raise OSError
    for folder in (root / "files", root / "info"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    deleted = datetime.now().strftime("%Y-%m-%dT%H:%M:%S")  # noqa: DTZ005 - the specification has local time
    text = f"[Trash Info]\nPath={quote(str(file.absolute()))}\nDeletionDate={deleted}\n"
    for name in _names(file.name):
        note = root / "info" / f"{name}.trashinfo"
        try:
            with note.open("x", encoding="utf-8") as stream:  # who makes it has the name
                stream.write(text)
        except FileExistsError:
            continue
        try:
            file.rename(root / "files" / name)
        except OSError:
            note.unlink()
            raise
        return root / "files"
    raise OSError


def _to_own(file: Path) -> Path:
    return _move(file, file.parent / OWN, SUFFIX)


def _move(file: Path, folder: Path, suffix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for name in _names(file.name):
        target = folder / f"{name}{suffix}"
        if not os.path.lexists(target):
            file.rename(target)
            return folder
    raise OSError


def _names(name: str) -> list[str]:
    """The name, and others like it."""
    path = Path(name)
    return [name, *(f"{path.stem}.{number}{path.suffix}" for number in range(2, 1000))]
