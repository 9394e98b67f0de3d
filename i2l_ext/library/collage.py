"""The preview of a LoRA: all its pictures in one."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageOps


def collage(squares: Sequence[Image.Image], size: int = 512) -> Image.Image:
    """All pictures in one, RGB ``size`` x ``size``, without gaps, in rows of nearly equal counts."""
    count = len(squares)
    rows = max(1, round(count**0.5))
    sheet = Image.new("RGB", (size, size), "white")
    for row in range(rows):
        line = squares[row * count // rows : (row + 1) * count // rows]
        top, bottom = row * size // rows, (row + 1) * size // rows
        for column, square in enumerate(line):
            left, right = column * size // len(line), (column + 1) * size // len(line)
            cell = ImageOps.fit(square, (right - left, bottom - top), Image.Resampling.BILINEAR)
            sheet.paste(cell, (left, top))
    return sheet
