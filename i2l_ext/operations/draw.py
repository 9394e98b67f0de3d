"""Drawing with the miniature's base model."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from i2l_ext import requests
from i2l_ext.converters.errors import UserError
from i2l_ext.operations.context import Context, Step
from i2l_ext.requests import weighted_file

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class DrawResult:
    """An image for each prompt, in RGB."""

    pictures: Sequence[Image.Image]

    def json(self) -> dict[str, list[str]]:
        """``pictures``: each as PNG in a ``data:`` URI."""
        return {"pictures": [_data_uri(picture) for picture in self.pictures]}


def draw_pictures(request: requests.DrawRequest, context: Context) -> DrawResult:
    """Draw. Raises UserError for a word that the miniature does not know, and for a LoRA of another base model."""
    from i2l_ext.converters.lora import Lora

    try:
        from i2l_ext.mini.sampler import Sampler
    except ImportError:
        raise UserError(
            "To draw with the miniature diffusers 0.37 or newer is needed: run install.py, which puts it into a folder "
            "of the engine's own.",
            "package_missing",
        ) from None

    loras = [(Lora.read(path), weight) for path, weight in map(weighted_file, request.loras)]
    context.reporter.plan([Step("draw", "draw")])
    context.reporter.begin("draw")
    sampler, pictures = Sampler(), []
    for number, prompt in enumerate(request.prompts):
        context.reporter.check()
        pictures += sampler.images([prompt], [request.seed], loras, request.size)
        context.reporter.progress((number + 1) / len(request.prompts))
    return DrawResult(pictures)


def _data_uri(picture: Image.Image) -> str:
    stream = BytesIO()
    picture.save(stream, "PNG")
    return f"data:image/png;base64,{b64encode(stream.getvalue()).decode()}"
