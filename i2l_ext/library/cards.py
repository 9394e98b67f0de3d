"""What lies beside a LoRA under its name: the preview and the sidecar. They go where it goes."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from i2l_ext.converters import atomic

PREVIEWS = tuple(f"{dot}{kind}" for dot in (".preview.", ".") for kind in ("png", "jpg", "jpeg", "webp"))
"""Endings of previews, as hosts look for them: the first that is there counts."""

SIDECAR = ".json"


def find_preview(file: Path, names: Collection[str] | None = None) -> Path | None:
    """The preview of a LoRA; None where there is none. ``names``: those in its folder, where they are known."""
    there = (lambda path: path.name in names) if names is not None else Path.is_file
    return next((path for path in (file.with_name(file.stem + end) for end in PREVIEWS) if there(path)), None)


def files_of(file: Path) -> list[Path]:
    """A LoRA and what belongs to it, as far as it is there; the LoRA first."""
    beside = [file.with_name(file.stem + end) for end in (*PREVIEWS, SIDECAR)]
    return [file, *(path for path in beside if path.is_file())]


@contextmanager
def carried_over(source: Path | None, target: Path) -> Iterator[None]:
    """A block at whose end ``target`` has copies of the preview and the sidecar of ``source``, where it has none of its
    own. They go again if the block fails. ``source`` None: nothing is copied."""
    copies: list[Path] = []
    try:
        yield
        for path, end in _card(source) if source and source.is_file() else ():
            copy = target.with_name(target.stem + end)
            if copy.exists() if end == SIDECAR else find_preview(target):
                continue
            with suppress(OSError), atomic.locked_temp_file(copy.parent) as part:
                shutil.copyfile(path, part)
                atomic.place(part, copy, overwrite=False)
                copies.append(copy)
    except BaseException:
        for copy in copies:
            copy.unlink(missing_ok=True)
        raise


def _card(file: Path) -> Iterator[tuple[Path, str]]:
    """The preview and the sidecar that are there, each with its ending."""
    for path in (find_preview(file), file.with_name(file.stem + SIDECAR)):
        if path is not None and path.is_file():
            yield path, path.name[len(file.stem) :]
