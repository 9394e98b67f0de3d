"""The place in the temporary folder that is this user's alone. Standard library only."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from i2l_ext.converters.errors import UserError


def own_temp_folder() -> Path:
    """The folder, made if it is missing. Raises UserError where somebody else has laid something in its place, or can
    write to it."""
    user = getattr(os, "getuid", lambda: "user")()
    folder = Path(tempfile.gettempdir()) / f"i2l-{user}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if os.name == "posix" and not _is_own(folder.lstat(), user):
        raise UserError(f"{folder} belongs to somebody else. Name a folder of your own in I2L_STATE.")
    return folder


def _is_own(status: os.stat_result, user: object) -> bool:
    """Whether it is a folder, not a link, that belongs to the user and that nobody else can write to."""
    return stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o022
