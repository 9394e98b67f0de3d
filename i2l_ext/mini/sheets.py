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
            small = image.resize((side, side), Image.Resampling.NEAREST if image.width < side else Image.Resampling.BOX)
            out.paste(small, (gap + x * (side + gap), head + gap + y * (side + gap)))
    return out


def demo_sheet(
    sampler: Sampler,
    references: Sequence[Image.Image],
    lora: Lora,
    prompts: Sequence[str] = ("a circle", "a star", "a moon left"),
    weights: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
) -> Image.Image:
    """The references, and for each prompt the image without the LoRA and with it at each of the LoRA weights."""
    columns = [
        sampler.images(prompts, [seed] * len(prompts), [(lora, weight)] if weight else ())
        for weight in (0, *weights)
    ]  # fmt: skip
    images = [list(row) for row in zip(*columns, strict=True)]
    titles = [f"reference: {len(references)}", "without", *(f"weight {weight:g}" for weight in weights)]
    blank = Image.new("RGB", references[0].size, "white")
    shown = [references[n] if n < len(references) else blank for n in range(len(prompts))]
    return image_grid([[reference, *row] for reference, row in zip(shown, images, strict=True)], titles)
