"""Several LoRAs in one job: one for each group of pictures, or for each picture and sub-folder of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.job import Job
from i2l_ext.requests import BatchRequest
from i2l_ext.service.settings import make_fields
from i2l_ext.service.uploads import split_crops

if TYPE_CHECKING:
    from i2l_ext.service.service import Service

MAX_GROUPED = 256
"""Pictures of all groups of one job."""

Group = tuple[str, Sequence[str]]
"""A LoRA's name, and its pictures as a tray has them: ``ID`` or ``ID@LEFT,TOP,SIDE``."""


def make_groups(service: Service, groups: Sequence[Group], *, subfolder: str = "", **values: Any) -> Job:
    """Make a LoRA for each group; a name that is taken gets a number. ``values``: other fields of a BatchRequest; None
    stands for the default. Raises UserError where nothing can be started; a group that fails later stops no other."""
    groups = [(name, pictures) for name, pictures in groups if pictures]
    if not groups:
        raise UserError("There is no picture yet. Drop at least one.")
    count = sum(len(pictures) for _, pictures in groups)
    if count > MAX_GROUPED:
        raise UserError(f"{count} pictures: at most {MAX_GROUPED} go at once. Make some of the styles later.")
    ids, crops = split_crops([id for _, pictures in groups for id in pictures])
    paths = tuple(path.absolute() for path in service.uploads.paths(ids))
    request = _request(service, paths, subfolder, values | {"crops": crops})
    with service.targets.lock:
        free = service.targets.free_names([name for name, _ in groups])
        named = tuple(name for name, (_, pictures) in zip(free, groups, strict=True) for _ in pictures)
        request = replace(request, names=named)
        request.validate()
        return service.submit(", ".join(free)[:200], request)


def make_each_of_folder(service: Service, folder: Path, *, subfolder: str = "", **values: Any) -> Job:
    """Make a LoRA for each picture and each sub-folder of a folder; what was made before is skipped."""
    request = _request(service, (folder.absolute(),), subfolder, values)
    request.validate()
    return service.submit(folder.name, request)


def _request(
    service: Service, pictures: tuple[Path, ...], subfolder: str, values: Mapping[str, Any]
) -> BatchRequest:  # fmt: skip
    folder, fields = service.targets.folder(subfolder), make_fields(service.host, service.models.choose(), values)
    request = BatchRequest(pictures, folder=folder.absolute(), **fields)
    if service.models.rows():
        service.models.find(request.model or "")
    return request
