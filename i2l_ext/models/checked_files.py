"""Model files and their checksums: what is known of a file is kept beside it, and every byte can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from i2l_ext.converters.atomic import atomic_path
from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.models.catalogue import Checkpoint
from i2l_ext.models.store import note_path, packed_form, read_note, shapes_of
from i2l_ext.weights.structure import check_structure

READ_SIZE = 8 << 20
"""Bytes read between two checks for cancellation."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done, and all bytes."""


def _silent(phase: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class DownloadCallbacks:
    """Who is told how far a download is, and who may stop it. Both are called on the caller's thread."""

    progress: Progress = _silent
    cancelled: Callable[[], bool] = lambda: False

    def check(self) -> None:
        """Raises Cancelled when the user wants to stop."""
        if self.cancelled():
            raise Cancelled


def digest(path: Path, like: str, callbacks: DownloadCallbacks) -> str:
    """The checksum of a file, of the same kind as ``like``: sha256 or git's sha1. Raises Cancelled."""
    total, done = path.stat().st_size, 0
    sha = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % total, usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(READ_SIZE):
            callbacks.check()
            sha.update(piece)
            done += len(piece)
            callbacks.progress(f"check {path.name}", done, total)
    return sha.hexdigest()


def verify(part: Checkpoint, paths: Sequence[Path], callbacks: DownloadCallbacks | None = None) -> str:
    """Check files by the hub's checksums, where they are known, and by our own modules; what was checked, as text.

    Raises UserError that names what is wrong, Cancelled when the user wants to stop.
    """
    checked = []
    for path in paths:
        noted = read_note(path).get("sha256")
        if isinstance(noted, str):
            if digest(path, noted, callbacks or DownloadCallbacks()) != noted:
                raise UserError(f"{path}: has changed since it was downloaded. Delete it and download it again.")
            checked.append(path)
    if part.kind == "template":
        return "checksum" if checked == list(paths) else "nothing (no checksum is known)"
    shapes = shapes_of(paths)
    if part.kind != "bias":
        check_structure(paths[0].name, part.shapes, shapes)
    whole = "checksum and structure" if checked == list(paths) else "structure (no checksum is known)"
    whole = whole if part.kind != "bias" else whole.replace("structure", "format")
    form = packed_form(paths)
    return f"{whole}; packed ({form})" if form else whole


def write_note(path: Path, measured: Path, sha256: str, facts: Mapping[str, str]) -> None:
    """Write down beside the file ``path`` its checksum and where it comes from. ``measured``: the file, perhaps still
    under its hidden name."""
    status = measured.stat()
    noted = {"sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns, **facts}
    with atomic_path(note_path(path), overwrite=True) as temp:
        temp.write_text(json.dumps(noted, indent=1), encoding="utf-8")
