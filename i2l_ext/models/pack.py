"""Packs model files to little more than half their size: those that are here, or those that are just arriving.

Each file becomes a packed one of its own, in our own folder, under the name that a download would give it. It appears
whole or not at all, and what was packed before a stop is kept, file by file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters.atomic import atomic_path, replace_text
from i2l_ext.converters.errors import UserError
from i2l_ext.models.catalogue import Checkpoint
from i2l_ext.models.checked_files import READ_SIZE, DownloadCallbacks, digest, write_note
from i2l_ext.models.store import INDEX, SHIPPED, gigabytes, known_sha256, packing_note, shards
from i2l_ext.weights.packing import PackNote, packed_bytes, packed_name

if TYPE_CHECKING:
    from i2l_ext.weights.pack_writer import PackWriter

RESERVE = 64 << 20
"""Bytes that are left free on the disk."""

PACKED_KINDS = ("siglip2", "dinov3", "qwen-vl", "heads")
"""Kinds of checkpoints that are packed. A bias is a small LoRA, and a template is code."""


def check_room(folder: Path, due: int, what: str) -> None:
    """Raises UserError where the disk of ``folder`` has not enough space for ``due`` bytes that are to be ``what``."""
    home = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(home).free
    if due and free < due + RESERVE:
        raise UserError(
            f"{folder}: {gigabytes(due)} are to be {what}, but only {gigabytes(free)} are free. "
            "Make room, or choose another folder with --to."
        )


def write_packed(
    target: Path,
    size: int,
    note: PackNote,
    fill: Callable[[PackWriter], None],
    callbacks: DownloadCallbacks,
    facts: Mapping[str, str],
) -> Path:
    """Write a packed file: ``fill`` gives the writer the ``size`` bytes of the unpacked one. ``facts``: for the note
    beside it. Where ``note`` has the unpacked file's sha256, that is compared.

    Raises UserError and what ``fill`` raises; then there is no file.
    """
    from i2l_ext.weights.pack_writer import PackWriter

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be written to ({error.strerror}).") from None
    with atomic_path(target) as temp:
        with temp.open("r+b") as stream:
            writer = PackWriter(stream, size, note.file, note)
            fill(writer)
            origin = writer.finish()
        if note.origin not in ("", origin):
            raise UserError(f"{note.file}: is not what its checksum says. Nothing was packed: download it again.")
        written = digest(temp, "0" * 64, callbacks)  # read back: what the disk really has
        write_note(target, temp, written, facts)
    return target


def pack_files(
    part: Checkpoint, paths: Sequence[Path], folder: Path, form: str, callbacks: DownloadCallbacks
) -> list[Path]:
    """Pack the located files of a checkpoint into ``folder``; the packed files. Those that are there already stay.

    Raises UserError, Cancelled; then what was packed so far is used by the next run.
    """
    home = folder / (part.repo or SHIPPED) / Path(part.files[0]).parent
    names = [path.name for path in paths] if part.files[0].endswith(INDEX) else [Path(part.files[0]).name]
    jobs = [(source, name, home / packed_name(name, form)) for source, name in zip(paths, names, strict=True)]
    due = sum(source.stat().st_size for source, _, target in jobs if not target.exists())
    check_room(folder, packed_bytes(due, part.dtype, form), "packed")
    for source, name, target in jobs:
        known = known_sha256(source)
        if target.exists():
            if _origin(part, target) != known and known is not None:
                raise UserError(f"{target}: was packed from another state of {name}. Delete it, and pack again.")
            continue

        def fill(writer: PackWriter, source: Path = source, name: str = name) -> None:
            total = source.stat().st_size
            with source.open("rb") as stream:
                while piece := stream.read(READ_SIZE):
                    callbacks.check()
                    writer.write(piece)
                    callbacks.progress(f"pack {name}", writer.taken, total)

        note = PackNote(part.id, name, form, known or "")
        facts = {"source": "packed", "repo": part.repo or SHIPPED, "file": name, "revision": known or ""}
        write_packed(target, source.stat().st_size, note, fill, callbacks, facts)
    if part.files[0].endswith(INDEX):
        _copy_index(paths, home / Path(part.files[0]).name)
    return [target for _, _, target in jobs]


def _origin(part: Checkpoint, path: Path) -> str | None:
    """The sha256 of the file that a packed one was made of. Raises UserError where it is another checkpoint's."""
    note = packing_note(path)
    if note is None or note.checkpoint != part.id:
        raise UserError(f"{path}: is not a packed file of {part.id}. Move it away or delete it.")
    return note.origin


def _copy_index(paths: Sequence[Path], target: Path) -> None:
    """The list of the shards, which the packed ones are found by."""
    if target.exists():
        return
    index = next(one for one in paths[0].parent.glob(f"*{INDEX}") if shards(one) == list(paths))
    replace_text(target, index.read_text(encoding="utf-8"))
