"""What the models see in pictures, as small images for a page."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from i2l_ext import requests
from i2l_ext.converters.errors import UserError
from i2l_ext.operations.context import Context

if TYPE_CHECKING:
    from PIL import Image

SIDE = 192
"""Pixels of a preview."""


@dataclass(frozen=True)
class PreviewResult:
    """For each picture ``{picture: data URI}`` of its centre square, or ``{error: line}``."""

    seen: Sequence[Mapping[str, str]]

    def json(self) -> list[dict[str, str]]:
        return [dict(one) for one in self.seen]


def preview_pictures(request: requests.PreviewRequest, context: Context) -> PreviewResult:
    """Open each picture and take what the models see of it. One that cannot be used does not stop the others."""
    from i2l_ext import images

    seen: list[Mapping[str, str]] = []
    numbers = request.numbers or range(1, len(request.pictures) + 1)
    for number, path in zip(numbers, request.pictures, strict=True):
        context.reporter.check()
        try:
            square = images.open_image(path, name=f"picture {number}", sizes=()).square
            seen.append({"picture": data_uri(square.resize((SIDE, SIDE)))})
        except UserError as error:
            seen.append({"error": str(error)})
    return PreviewResult(seen)


def data_uri(image: Image.Image) -> str:
    """The image as JPEG in a ``data:`` URI."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(stream.getvalue()).decode()}"
