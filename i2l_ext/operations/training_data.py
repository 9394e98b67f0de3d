"""The pictures that a training run from a LoRA shows, and their prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext.converters.errors import UserError, one_line
from i2l_ext.converters.files import TensorFile
from i2l_ext.converters.headers import read_json
from i2l_ext.engine.queue import state_folder
from i2l_ext.library.cards import SIDECAR
from i2l_ext.library.metadata import how_made
from i2l_ext.requests import CENTRE, parse_crop

if TYPE_CHECKING:
    from i2l_ext.operations.context import Context
    from i2l_ext.requests import ExportRequest, Square

MAX_CAPTION = 1 << 14
"""Bytes of a caption file: far more than a text encoder reads."""


def pictures_of(request: ExportRequest, context: Context) -> list[tuple[Path, Square | None]]:
    """The pictures to train on, each with the square of it that is meant (None: the whole): those that are named, else
    those that made the LoRA, found by their content. Those that are not found are told. Raises UserError for a named
    path that does not exist."""
    from i2l_ext import images

    if request.pictures:
        return [(path, None) for path in images.collect(request.pictures)]
    if request.file.is_dir():
        return []
    with TensorFile(request.file) as file:
        made = how_made(file.header.metadata)
    wanted = made["images"] if made else []
    uploads = state_folder() / "uploads" if wanted else Path()
    found = [(path, parse_crop(one.get("crop", CENTRE))) for one in wanted if (path := _upload(uploads, one["sha256"]))]
    if len(found) < len(wanted):
        context.reporter.note(
            f"{len(wanted) - len(found)} of the {len(wanted)} pictures that made the LoRA are not here. "
            "To train on them, name them or their folder: --pictures."
        )
    return found


def _upload(folder: Path, digest: str) -> Path | None:
    """The picture of that SHA-256 in a folder where pictures are called by it; it must still be that picture."""
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        return None
    path = folder / digest
    try:
        return path if hashlib.sha256(path.read_bytes()).hexdigest() == digest else None
    except OSError:
        return None


def copies(pictures: Sequence[tuple[Path, Square | None]]) -> Mapping[str, Callable[[Path], object]]:
    """{name in the start folder: what writes the picture to a path}, in order. Raises UserError for a picture that
    cannot be used."""
    from i2l_ext import images

    made = [images.plain_copy(path, crop) for path, crop in pictures]
    width = len(str(len(made)))
    return {f"{number:0{width}}{suffix}": write for number, (suffix, write) in enumerate(made, 1)}


def prompts(
    request: ExportRequest, pictures: Sequence[tuple[Path, Square | None]], names: Iterable[str]
) -> dict[str, Any]:
    """What `export` is told of prompts: that of every picture, and by name in the start folder the picture's own, which
    is the text of the file that lies beside it, `pic.txt` beside `pic.jpg`; how many such files the request's caption
    stands in for; and what the pictures were called. ``names``: of the pictures, in the same order. Raises UserError
    for a text that cannot be read."""
    paths = {name: path for name, (path, _) in zip(names, pictures, strict=True)}
    beside = {name: text for name, path in paths.items() if (text := path.with_suffix(".txt")).is_file()}
    # an upload is called by its content, which tells nothing
    told: dict[str, Any] = {
        "originals": {name: one_line(path.name) for name, path in paths.items()} if request.pictures else {}
    }
    if request.caption is not None:
        return {**told, "caption": request.caption, "unused_captions": len(beside)}
    own = {name: _text(text) for name, text in beside.items()}
    return {**told, "caption": _activation_text(request.file), "captions": own}


def _text(path: Path) -> str:
    """A caption without the blanks around it. Raises UserError where it is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CAPTION + 1)
        if len(data) > MAX_CAPTION:
            raise UserError(f"{one_line(path.name)}: is longer than {MAX_CAPTION} bytes, too long for a caption.")
        return data.decode("utf-8-sig").strip()
    except OSError as error:
        raise UserError(f"{one_line(path.name)}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"{one_line(path.name)}: is not UTF-8. Save it as UTF-8, or say --caption.") from None


def _activation_text(file: Path) -> str:
    """The activation text in the sidecar of a LoRA, in one line; "" where there is none."""
    try:
        text = read_json(file.with_name(file.stem + SIDECAR)).get("activation text")
    except (OSError, ValueError, UserError):
        return ""
    return one_line(text)[:1000] if isinstance(text, str) else ""
