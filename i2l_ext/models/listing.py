"""Every model of the catalogue, and what of it is here: what ``i2l models`` and the tab show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.errors import UserError
from i2l_ext.models import catalogue
from i2l_ext.models.catalogue import Checkpoint
from i2l_ext.models.store import Folders, locate, packed_form
from i2l_ext.weights.structure import structure_md5


@dataclass(frozen=True)
class CheckpointStatus:
    """A checkpoint as ``i2l models`` shows it. ``repo``: where it is downloaded from; None for what we ship.
    ``bytes``: of the files where they are here, else to download. ``structure_md5``: of our own module definitions;
    None where it was not asked for or there is none. ``problem``: why files of that name cannot be used. ``packed``:
    how its numbers are packed, a key of PACK_FORMATS; None where they are as published."""

    id: str
    parameters: int
    structure_md5: str | None
    present: bool
    path: str | None
    bytes: int
    licence: str
    repo: str | None
    problem: str | None = None
    packed: str | None = None


@dataclass(frozen=True)
class ModelStatus:
    """A model as ``i2l models`` shows it. ``download_folder``: where a download goes. ``has_code``: it is a template,
    whose code runs only after ``i2l models trust``; ``agreed``: some state of it was agreed to, perhaps not this."""

    name: str
    arch: str
    line: str
    parts: tuple[CheckpointStatus, ...]
    ready: bool
    download_bytes: int
    download_folder: str
    has_code: bool = False
    agreed: bool = False

    def json(self) -> dict[str, Any]:
        return asdict(self)


def listing(folders: Folders | None = None, *, structures: bool = False) -> list[ModelStatus]:
    """Every model of the catalogue and what of it is here, the miniatures last. ``structures`` builds our modules on
    the meta device (it imports torch) for their hashes and exact sizes."""
    folders = folders or Folders.default()
    parts = {part.id: part for model in catalogue.MODELS.values() for part in model.parts}
    shown = {id: _status(part, folders, structures) for id, part in parts.items()}
    return [
        ModelStatus(
            model.name,
            model.arch.id,
            model.line,
            tuple(shown[part.id] for part in model.parts),
            all(shown[part.id].present for part in model.parts),
            sum(part.nbytes for part in model.parts if part.repo and not shown[part.id].present),
            str(folders.own.absolute()),
            model.template is not None,
        )
        for model in sorted(catalogue.MODELS.values(), key=lambda model: model.arch is MINI)
    ]


def _status(part: Checkpoint, folders: Folders, structures: bool) -> CheckpointStatus:
    problem, paths = None, None
    try:
        paths = locate(part, folders)
    except UserError as error:
        problem = str(error)
    held = paths and part.kind == "template" and [path for path in paths[0].parent.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in held or paths) if paths else part.nbytes
    parameters, md5 = part.parameters, None
    if structures and part.kind not in ("bias", "template"):
        parameters, md5 = sum(map(prod, part.shapes.values())), structure_md5(part.shapes)
    first = str(paths[0]) if paths else None
    packed = packed_form(paths) if paths else None
    return CheckpointStatus(
        part.id, parameters, md5, bool(paths), first, size, part.licence, part.repo, problem, packed
    )
