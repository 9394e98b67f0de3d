"""Pictures from a browser, kept under the hash of their content until they are used, or a week has passed.

Nothing that the browser says is believed: not that a path is an upload, not a name, not a type.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from i2l_ext.converters import atomic
from i2l_ext.converters.errors import UserError
from i2l_ext.service.disk_errors import explain_disk_errors

MAX_PICTURES = 64
MAX_BYTES = 128 << 20
"""Of one picture; the engine takes no larger one."""

MAX_KEPT = 8 << 30
"""Bytes of all pictures; beyond them the ones that nobody has used for the longest time go."""

KEPT_SECONDS = 7 * 24 * 3600

_HASH = re.compile(r"[0-9a-f]{64}")
_PREVIEW = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+=*")


class Uploads:
    """The folder of uploaded pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, path: Path) -> str:
        """Keep a copy of the file at a path that was found good; its id."""
        try:
            with path.open("rb") as stream:
                return self.take_stream(stream)
        except OSError as error:
            raise UserError(f"A picture could not be taken in ({error.strerror}). Drop it again.") from None

    @explain_disk_errors("A picture could not be taken in")
    def take_stream(self, stream: BinaryIO) -> str:
        """Keep the bytes of a stream; their id. Raises UserError where there are too many, DiskError where there is no
        room for them; then nothing is left of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        atomic.remove_stale(self.folder)
        with atomic.locked_temp_file(self.folder) as part:
            with part.open("wb") as out:
                while piece := stream.read(1 << 20):
                    size += len(piece)
                    if size > MAX_BYTES:
                        raise UserError(f"A picture is larger than {MAX_BYTES >> 20} MB. Make it smaller.")
                    digest.update(piece)
                    out.write(piece)
            if not size:
                raise UserError("A picture is empty. Copy or download it again.")
            kept = self.folder / digest.hexdigest()
            try:
                atomic.place(part, kept, overwrite=True)
            except PermissionError:  # Windows, while the engine reads it: the same bytes are there
                os.utime(kept)
        self._trim()
        return digest.hexdigest()

    def paths(self, ids: Sequence[object]) -> list[Path]:
        """Where the pictures of these ids lie. Raises UserError for an id that is none, or is gone."""
        if len(ids) > MAX_PICTURES:
            raise UserError(f"{len(ids)} pictures: at most {MAX_PICTURES} make one LoRA. Remove some.")
        found = []
        for id in ids:
            path = self.folder / id if isinstance(id, str) and _HASH.fullmatch(id) else None
            if path is None or not path.is_file():
                raise UserError("A picture is no longer here. Remove it and drop it again.")
            with suppress(OSError):
                os.utime(path)
            found.append(path)
        return found

    def preview(self, id: str) -> str | None:
        """The data URI that is kept with a picture; None where there is none."""
        with suppress(OSError, ValueError):
            uri = self._preview(id).read_text(encoding="ascii")
            return uri if _PREVIEW.fullmatch(uri) else None
        return None

    def keep_preview(self, id: str, uri: str) -> None:
        """Keep a data URI as long as the picture is kept. Where the disk refuses, it is made again next time."""
        with suppress(OSError):
            atomic.replace_text(self._preview(id), uri)

    def _preview(self, id: str) -> Path:
        return self.folder / f"{id}.preview"

    def _trim(self) -> None:
        found = []
        for path in self.folder.glob("*"):
            with suppress(OSError):  # another process may take it away as well
                if _HASH.fullmatch(path.name):
                    status, preview = path.stat(), self._preview(path.name)
                    size = status.st_size + (preview.stat().st_size if preview.exists() else 0)
                    found.append((status.st_mtime, size, path))
        kept = 0
        for _, size, path in sorted(found, reverse=True):
            kept += size
            if kept > MAX_KEPT:
                self._let_go(path)

    def _let_go(self, path: Path) -> None:
        for file in (self._preview(path.name), path):
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Let go what nobody has used for a week."""
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    self._let_go(path)


def upload_folders() -> list[Path]:
    """Where gradio puts what a browser uploads."""
    return [Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio").resolve()]


def received(claimed: Iterable[str], folders: Iterable[Path]) -> list[Path]:
    """The paths that really are uploads: plain files inside ``folders``, links followed. Raises UserError."""
    roots = [folder.resolve() for folder in folders]
    found = []
    for name in claimed:
        real = _resolved(Path(name))
        if real is None or not real.is_file() or not any(root in real.parents for root in roots):
            raise UserError("That is not a file which this page uploaded. Drop it again.")
        found.append(real)
    return found


def _resolved(path: Path) -> Path | None:
    """Where a whole path leads; None for half characters, NUL, links in a ring."""
    try:
        return path.resolve() if path.is_absolute() else None
    except (OSError, ValueError, RuntimeError):
        return None
