"""The request to draw with the miniature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from i2l_ext.converters.errors import UserError
from i2l_ext.requests.fields import Request, option

MOST_PICTURES = 64
"""Prompts of one request."""


@dataclass(frozen=True)
class DrawRequest(Request):
    """Images from the miniature's base model, one for each prompt, with LoRAs of the miniature or without: ``loras``
    are texts FILE or FILE:WEIGHT. They are 64 pixels wide, and enlarged to ``size``."""

    kind: ClassVar[str] = "draw"

    prompts: tuple[str, ...] = option("such as 'a star left'")
    loras: tuple[str, ...] = option("a LoRA and its weight", (), metavar="FILE[:WEIGHT]", local=True)
    seed: int = option("the same seed gives the same image", 0, minimum=0)
    size: int = option("side of an image in pixels", 256, minimum=32, maximum=4096)

    def validate(self) -> None:
        """Raises UserError where a value is out of its range, or where there are no prompts or too many."""
        super().validate()
        if not 1 <= len(self.prompts) <= MOST_PICTURES:
            raise UserError(f"Give 1 to {MOST_PICTURES} prompts, not {len(self.prompts)}.", "out_of_range")
