"""What the models see in uploaded pictures, and the whole pictures: asked of the engine once, and kept with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.queue import Queue
from i2l_ext.requests import CENTRE, PreviewRequest
from i2l_ext.service.uploads import Uploads, split_crops

TIMEOUT = 120.0
"""Seconds for the previews of some pictures."""

WHOLE = "whole"
"""The kind under which a whole picture is kept; that of a square is the square, that of the centre has no name."""


def preview_uploads(uploads: Uploads, queue: Queue, ids: Sequence[str]) -> list[dict[str, Any]]:
    """For each id of a tray, ``ID`` or ``ID@LEFT,TOP,SIDE``: ``{id, picture: data URI, width, height}`` or ``{id,
    error: line}``. The engine is asked for new ones only.

    Raises UserError for a square that is none, and where the engine fails or takes longer than TIMEOUT.
    """
    shas, crops = split_crops(ids)
    paths = uploads.paths(shas)
    crops = crops or (CENTRE,) * len(ids)
    kinds = ["" if crop == CENTRE else crop for crop in crops]
    request = PreviewRequest(tuple(path.absolute() for path in paths), tuple(range(1, len(ids) + 1)), crops)
    request.validate()
    seen = [uploads.preview(sha, kind) for sha, kind in zip(shas, kinds, strict=True)]
    new = [at for at, one in enumerate(seen) if one is None]
    for at, one in zip(new, _ask(queue, request, new) if new else (), strict=True):
        seen[at] = one
        if "picture" in one:
            uploads.keep_preview(shas[at], one, kinds[at])
    return [{"id": id, **(one or {})} for id, one in zip(ids, seen, strict=True)]


def whole_upload(uploads: Uploads, queue: Queue, id: str) -> dict[str, Any]:
    """The whole picture of an upload: ``{picture: data URI, width, height}``; the size is the picture's own. Raises
    UserError."""
    [path] = uploads.paths([id])
    kept = uploads.preview(id, WHOLE)
    if kept is None:
        [kept] = _ask(queue, PreviewRequest((path.absolute(),), (1,), whole=True), [0])
        if "error" in kept:
            raise UserError(kept["error"])
        uploads.keep_preview(id, kept, WHOLE)
    return kept


def _ask(queue: Queue, request: PreviewRequest, chosen: Sequence[int]) -> Any:
    """What the engine tells of some of the request's pictures."""
    asked = request.of(chosen)
    job = queue.submit("look", "", {"request": asked.json()})
    try:
        queue.wait(job.id, TIMEOUT)
    except TimeoutError:
        queue.cancel(job.id)
        raise UserError("Opening the pictures takes too long. Remove some, or try again.") from None
    if job.state != "done":
        raise UserError(job.error or "The pictures could not be opened. Try again.")
    return job.result
