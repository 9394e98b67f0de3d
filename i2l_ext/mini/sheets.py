"""Several images on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from i2l_ext.converters.lora import Lora

from .sampler import Sampler


def image_grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] = (), side: int = 128) -> Image.Image:
    """Images in rows and columns, each ``side`` pixels wide, with a title above each column. A shorter row leaves
    its end blank."""
    gap, head = 6, 18 if any(titles) else 0
    columns = max(map(len, rows))
    out = Image.new("RGB", (columns * (side + gap) + gap, head + len(rows) * (side + gap) + gap), "white")
    pen = ImageDraw.Draw(out)
    for column, title in enumerate(titles):
        pen.text((gap + column * (side + gap), 4), title, fill="black")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            small = image.resize((side, side), Image.Resampling.LANCZOS if image.width < side else Image.Resampling.BOX)
            out.paste(small, (gap + x * (side + gap), head + gap + y * (side + gap)))
    return out


WEIGHTS = (0.25, 0.5, 0.75, 1.0)
"""LoRA weights of the demo's sheet, in which the image without the LoRA stands first."""


def demo_sheet(
    sampler: Sampler, references: Sequence[Image.Image], lora: Lora, other_reference: Image.Image, other: Lora
) -> Image.Image:
    """What LoRAs of two styles do. At the top the first one's references, and for three prompts the image without it
    and with it at four LoRA weights; below it a mixture with the other one, from none of it to it alone; on the right
    one large image."""
    prompts = ("a flower", "a boat", "a moon left")
    columns = [
        sampler.images(prompts, [0] * len(prompts), [(lora, weight)] if weight else ()) for weight in (0, *WEIGHTS)
    ]
    rows = [[reference, *images] for reference, images in zip(references, zip(*columns, strict=True), strict=False)]
    titles = [f"reference: {len(references)}", "without", *(f"weight {weight:g}" for weight in WEIGHTS)]
    mixed = [sampler.images(["a star"], [0], [(lora, 1 - part), (other, part)])[0] for part in (0, *WEIGHTS)]
    parts = ["another style", *(f"{part:.0%} of it" for part in (0, *WEIGHTS))]
    grids = [image_grid(rows, titles), image_grid([[other_reference, *mixed]], parts)]
    side = sum(grid.height for grid in grids)
    [large] = sampler.images(["a heart"], [0], [(lora, 1.0)], side - 24)
    out = Image.new("RGB", (grids[0].width + side - 18, side), "white")
    out.paste(grids[0], (0, 0))
    out.paste(grids[1], (0, grids[0].height))
    out.paste(large, (grids[0].width, 18))
    return out
