"""Pictures from a browser, kept under the hash of their content until they are used, or a week has passed.

Nothing that the browser says is believed: not that a path is an upload, not a name, not a type.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from i2l_ext.converters import atomic
from i2l_ext.converters.errors import UserError
from i2l_ext.requests import CENTRE
from i2l_ext.service.disk_errors import explain_disk_errors

MAX_PICTURES = 64
MAX_BYTES = 128 << 20
"""Of one picture; the engine takes no larger one."""

MAX_KEPT = 8 << 30
"""Bytes of all pictures; beyond them the ones that nobody has used for the longest time go."""

KEPT_SECONDS = 7 * 24 * 3600

_HASH = re.compile(r"[0-9a-f]{64}")
_PREVIEW = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+=*")
_KIND, _ENDING = "@", ".preview"


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

    def preview(self, id: str, kind: str = "") -> dict[str, Any] | None:
        """What is kept with a picture under a ``kind``: ``{picture: data URI, width, height}``; None where there is
        nothing."""
        with suppress(OSError, ValueError, RecursionError, AttributeError, TypeError):
            kept = json.loads(self._preview(id, kind).read_text(encoding="ascii"))
            told = {"picture": str(kept["picture"]), "width": int(kept["width"]), "height": int(kept["height"])}
            return told if _PREVIEW.fullmatch(kept["picture"]) else None
        return None

    def keep_preview(self, id: str, preview: Mapping[str, Any], kind: str = "") -> None:
        """Keep that as long as the picture is kept. Where the disk refuses, it is made again next time."""
        with suppress(OSError):
            atomic.replace_text(self._preview(id, kind), json.dumps(dict(preview)))

    def _preview(self, id: str, kind: str) -> Path:
        return self.folder / f"{id}{_KIND if kind else ''}{kind}{_ENDING}"

    def _trim(self) -> None:
        """Let go the pictures that were not used for the longest time, with their previews, where there are too many
        bytes."""
        groups = []
        for files in self._groups().values():
            with suppress(OSError):  # another process may take them away as well
                status = [file.stat() for file in files]
                groups.append((status[0].st_mtime, sum(one.st_size for one in status), files))
        kept = 0
        for _, size, files in sorted(groups, reverse=True):
            kept += size
            if kept > MAX_KEPT:
                _unlink(files)

    def sweep(self) -> None:
        """Let go what nobody has used for a week."""
        groups = self._groups()
        for file in self.folder.glob("*") if self.folder.is_dir() else ():
            with suppress(OSError):
                if time.time() - file.stat().st_mtime > KEPT_SECONDS:
                    _unlink([file, *groups.get(file.name, [])])

    def _groups(self) -> dict[str, list[Path]]:
        """By its id each picture, and after it its previews."""
        files = list(self.folder.glob("*"))
        groups: dict[str, list[Path]] = {file.name: [file] for file in files if _HASH.fullmatch(file.name)}
        for file in files:
            if file.name.endswith(_ENDING) and file.name[:64] in groups:
                groups[file.name[:64]].append(file)
        return groups


def _unlink(files: Iterable[Path]) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def split_crops(ids: Sequence[str]) -> tuple[list[str], tuple[str, ...] | None]:
    """From ids of a tray, ``ID`` or ``ID@LEFT,TOP,SIDE``: the ids of the uploads, and the square of each; None where
    all are the centre. A square is checked by the request that has it."""
    parts = [id.partition(_KIND) for id in ids]
    crops = tuple(crop if mark else CENTRE for _, mark, crop in parts)
    return [id for id, _, _ in parts], None if set(crops) <= {CENTRE} else crops


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
