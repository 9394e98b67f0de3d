"""The folder in which a WebUI keeps its LoRAs: free names, and files that appear whole.

A LoRA is three files with one stem. Each is first written under a hidden name with a suffix that no host lists. Then
they get their names, the LoRA last, each in one step that cannot replace a file. The first file to get its name decides
which of two processes has the stem, so there is no lock that a dead process could leave behind. A file that is to be
overwritten keeps its name until the new file takes it; a second name or a copy of it is kept to go back.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext.converters import atomic
from i2l_ext.converters.atomic import place
from i2l_ext.converters.errors import UserError
from i2l_ext.library.names import check_name, with_number

if TYPE_CHECKING:
    from PIL import Image

_OCCUPYING = (".safetensors", ".pt", ".ckpt", ".preview.png", ".json")
"""A stem is taken when a file with one of these suffixes exists: those that hosts list, and those we write."""

LORA_FOLDERS = {"extensions": "Lora", "custom_nodes": "loras"}
"""Where hosts keep what is added to them -> what their LoRA folder is called, in models/."""

_REASONS = {
    errno.ENOSPC: "the disk is full",
    getattr(errno, "EDQUOT", errno.ENOSPC): "the disk is full",
    errno.EFBIG: "the disk does not take a file so large",
    errno.EACCES: "writing is not allowed there, or another program holds the file",
    errno.EPERM: "writing is not allowed there",
    errno.EROFS: "the disk is read-only",
    errno.ENAMETOOLONG: "its path is too long",
    errno.ENOENT: "it is gone, or its path is too long for Windows",
    errno.ENOTDIR: "it is a file, not a folder",
    errno.EEXIST: "it is a file, not a folder",
}


@dataclass(frozen=True)
class SavedLora:
    """The files of a LoRA. ``name`` is their stem, which may differ from the name that was asked for."""

    name: str
    file: Path
    preview: Path
    sidecar: Path

    @staticmethod
    def at(folder: Path, name: str) -> SavedLora:
        file, preview, sidecar = (folder / f"{name}{end}" for end in (".safetensors", ".preview.png", ".json"))
        return SavedLora(name, file, preview, sidecar)


def fresh_name(folder: Path | str, name: str) -> str:
    """``name``, or name-2, name-3, … where it is taken, in upper or lower case, here or in a sub-folder.

    Hosts identify and cache a LoRA by its stem alone, so a used name must not come to mean another file.
    """
    return free_name(name, names_below(Path(folder)))


def free_name(name: str, taken: Collection[str]) -> str:
    """The same, where ``taken`` has the lower-case names of all files, as names_below gives them."""
    for number in itertools.count(1):
        stem = with_number(name, number)
        if not any(stem.lower() + end in taken for end in _OCCUPYING):
            return stem
    raise AssertionError


def find_lora_folder(checkout: Path) -> Path | None:
    """The LoRA folder of the host in which the checkout is: models/Lora of a WebUI, models/loras of ComfyUI. Else
    models/Lora of the working directory; None where there is neither."""
    models, host = checkout.parent.parent / "models", LORA_FOLDERS.get(checkout.parent.name)
    if host and models.is_dir():
        return models / host
    here = Path("models", "Lora")
    return here if here.is_dir() else None


def check_folder(folder: Path | str, need: int = 0) -> None:
    """Raises UserError where ``need`` bytes cannot be written there. Call it before the slow part."""
    folder = Path(folder)
    with _explained(folder), ExitStack() as gone:
        _make_folder(folder, gone)
        gone.enter_context(atomic.locked_temp_file(folder))
        if shutil.disk_usage(folder).free < need:
            raise OSError(errno.ENOSPC, "")


def save_lora(
    folder: Path | str,
    name: str,
    write: Callable[[Path, str], None],
    *,
    preview: Image.Image,
    sidecar: Mapping[str, Any],
    overwrite: bool = False,
) -> SavedLora:
    """Put a LoRA, its preview and its sidecar into ``folder``: all three, or the folder stays as it was.

    At every moment each file is the whole old one or the whole new one, also on a disk without hard links. The LoRA
    comes last: a process that is killed can leave a new preview or sidecar, but never half a LoRA.

    ``write(path, stem)`` writes the LoRA, which gets the name ``stem``. It is called again with another stem where
    another process has taken the first one meanwhile. The folder is made if it is missing. With ``overwrite`` the
    stem is ``name``, and files that have it are replaced. Raises UserError.
    """
    folder, name = Path(folder), check_name(name)
    with _explained(folder), ExitStack() as undo:
        _make_folder(folder, undo)
        atomic.remove_stale(folder)
        for _ in range(100):
            target = SavedLora.at(folder, name if overwrite else fresh_name(folder, name))
            if _save_as(target, write, preview, sidecar, overwrite):
                undo.pop_all()
                return target
        raise UserError(f"{name}: other programs keep taking this name in {folder}. Choose another one.")


def _save_as(
    target: SavedLora,
    write: Callable[[Path, str], None],
    preview: Image.Image,
    sidecar: Mapping[str, Any],
    overwrite: bool,
) -> bool:
    """False where the name was taken meanwhile. Then, as after any error, the folder is as it was."""
    finals = (target.sidecar, target.preview, target.file)
    for final in finals if overwrite else ():
        if final.is_dir():
            raise UserError(f"{final.name} is a folder in {final.parent}. Choose another name.")
    with ExitStack() as temporary, ExitStack() as undo:
        note, picture, lora = (temporary.enter_context(atomic.locked_temp_file(final.parent)) for final in finals)
        note.write_text(json.dumps(sidecar, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
        picture.write_bytes(_png(preview))
        write(lora, target.name)
        for part in (note, picture, lora):
            atomic.flush(part)
        for part, final in zip((note, picture, lora), finals, strict=True):
            old = _keep(final, temporary.enter_context(_spare(final.parent))) if overwrite else None
            undo.callback(_restore, final, part.stat(), old)
            try:
                place(part, final, overwrite=overwrite)
            except FileExistsError:
                return False
        undo.pop_all()
    return True


def _png(image: Image.Image) -> bytes:
    stream = BytesIO()  # given a path, Pillow does not tell why a write failed
    image.save(stream, "PNG")
    return stream.getvalue()


@contextmanager
def _spare(folder: Path) -> Iterator[Path]:
    """A path of which a file may be that is gone at the end, under a name that no host lists."""
    path = atomic.temp_path(folder)
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _keep(final: Path, backup: Path) -> Path | None:
    """``backup``, a second name of the file that is to be replaced; None where there is no file."""
    with suppress(FileNotFoundError):
        try:
            os.link(final, backup)
        except FileNotFoundError:
            raise
        except OSError:  # a disk without hard links
            shutil.copyfile(final, backup)
        return backup
    return None


def _restore(final: Path, ours: os.stat_result, old: Path | None) -> None:
    """Restore what was there before, in one step."""
    if old is not None:
        old.replace(final)
        return
    with suppress(FileNotFoundError):
        if ours.st_ino and os.path.samestat(final.lstat(), ours):  # on some network shares all files have the number 0
            final.unlink()


def _make_folder(folder: Path, undo: ExitStack) -> None:
    """Make the folder; ``undo`` removes what was made, if it is empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        undo.callback(_remove_empty, path)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def names_below(folder: Path) -> set[str]:
    """Lower-case names of all files and folders in ``folder`` and below, in Unicode's form NFC. Links are followed, as
    hosts do."""
    names: set[str] = set()
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link to a parent folder
            folders.clear()
            continue
        seen.add(real)
        names.update(unicodedata.normalize("NFC", name).lower() for name in (*folders, *files))
    return names


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, f"{error.strerror or error}")
        raise UserError(f"Cannot write to {folder} ({reason}). Put that right, or choose another folder.") from error
