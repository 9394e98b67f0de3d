"""What the models see in uploaded pictures: asked of the engine once, and kept with the uploads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.queue import Queue
from i2l_ext.requests import PreviewRequest
from i2l_ext.service.uploads import Uploads

TIMEOUT = 120.0
"""Seconds for the previews of some pictures."""


def preview_uploads(uploads: Uploads, queue: Queue, ids: Sequence[str]) -> list[dict[str, Any]]:
    """For each upload ``{id, picture: data URI}`` or ``{id, error: line}``. The engine is asked for new ones only.

    Raises UserError where the engine fails or takes longer than TIMEOUT.
    """
    paths = dict(zip(ids, uploads.paths(ids), strict=True))
    seen: dict[str, Any] = {id: {"picture": uri} for id in ids if (uri := uploads.preview(id))}
    if new := [id for id in paths if id not in seen]:
        numbers = tuple(list(ids).index(id) + 1 for id in new)
        for id, one in zip(new, _ask(queue, [paths[id] for id in new], numbers), strict=True):
            seen[id] = one
            if "picture" in one:
                uploads.keep_preview(id, one["picture"])
    return [{"id": id, **seen[id]} for id in ids]


def _ask(queue: Queue, paths: Sequence[Path], numbers: tuple[int, ...]) -> Any:
    request = PreviewRequest(tuple(path.absolute() for path in paths), numbers)
    job = queue.submit("look", "", {"request": request.json()})
    try:
        queue.wait(job.id, TIMEOUT)
    except TimeoutError:
        queue.cancel(job.id)
        raise UserError("Opening the pictures takes too long. Remove some, or try again.") from None
    if job.state != "done":
        raise UserError(job.error or "The pictures could not be opened. Try again.")
    return job.result
