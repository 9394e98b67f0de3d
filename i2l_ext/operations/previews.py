"""What the models see in pictures, or the whole pictures, as small images for a page."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from i2l_ext import requests
from i2l_ext.converters.errors import UserError
from i2l_ext.operations.context import Context

if TYPE_CHECKING:
    from PIL import Image

SIDE = 192
"""Pixels of a preview."""

WHOLE_SIDE = 960
"""Pixels of the long side of a whole picture."""


@dataclass(frozen=True)
class PreviewResult:
    """For each picture ``{picture: data URI, width, height}``, or ``{error: line}``. Width and height are those of the
    upright picture itself, in pixels."""

    seen: Sequence[Mapping[str, Any]]

    def json(self) -> list[dict[str, Any]]:
        return [dict(one) for one in self.seen]


def preview_pictures(request: requests.PreviewRequest, context: Context) -> PreviewResult:
    """Open each picture and take what the models see of it, or all of it. One that cannot be used does not stop the
    others."""
    from i2l_ext import images

    seen: list[Mapping[str, Any]] = []
    numbers = request.numbers or range(1, len(request.pictures) + 1)
    crops = request.crops or (requests.CENTRE,) * len(request.pictures)
    for number, path, crop in zip(numbers, request.pictures, crops, strict=True):
        context.reporter.check()
        try:
            whole = images.open_whole(path, name=f"picture {number}")
            width, height = whole.image.size
            if request.whole:
                whole.image.thumbnail((WHOLE_SIDE, WHOLE_SIDE))
                shown = whole.image
            else:
                shown = whole.cropped(requests.parse_crop(crop), sizes=()).square.resize((SIDE, SIDE))
            seen.append({"picture": data_uri(shown), "width": width, "height": height})
        except UserError as error:
            seen.append({"error": str(error)})
    return PreviewResult(seen)


def data_uri(image: Image.Image) -> str:
    """The image as JPEG in a ``data:`` URI."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(stream.getvalue()).decode()}"
