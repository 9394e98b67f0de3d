"""Drawing with the miniature's base, with LoRAs or without: what a WebUI does with a big one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.lora import Lora

from .base import Base

WEIGHTS = Path(__file__).with_name("weights")
SAMPLES = Path(__file__).with_name("samples")

Weighted = Sequence[tuple[Lora, float]]

_TAG = re.compile(r"<lora:([^:>]+)(?::([^:>]*))?>")


class Painter:
    """The base, loaded once."""

    def __init__(self, weights: Path = WEIGHTS / "base.safetensors") -> None:
        self.base = Base.load(weights)

    def paint(self, prompt: str, seed: int = 0, loras: Weighted = (), size: int | None = None) -> Image.Image:
        """One picture, RGB 32 x 32, or enlarged to ``size`` without smoothing.

        Raises UserError for a word that the base does not know and for a LoRA of another model.
        """
        [picture] = self.paint_all([prompt], [seed], loras, size)
        return picture

    def paint_all(
        self, prompts: Sequence[str], seeds: Sequence[int], loras: Weighted = (), size: int | None = None
    ) -> list[Image.Image]:
        """The same for many at once; a picture does not depend on those beside it."""
        return [as_image(picture, size) for picture in self.tensors(prompts, seeds, loras)]

    def tensors(self, prompts: Sequence[str], seeds: Sequence[int], loras: Weighted = ()) -> torch.Tensor:
        """The same as float32 [N, 3, 32, 32] in 0..1."""
        with self.wearing(loras):
            parts = [self.base.draw(prompts[i : i + 64], seeds[i : i + 64]) for i in range(0, len(prompts), 64)]
        return torch.cat(parts)

    @contextmanager
    def wearing(self, loras: Weighted) -> Iterator[Base]:
        """The base with the LoRAs added to its weights, each times its weight, until the block ends."""
        before: dict[str, torch.Tensor] = {}
        try:
            for lora, weight in loras:
                if lora.arch is not MINI:
                    raise UserError(f"This LoRA is for {lora.arch.title}; drawing works with the miniature's only.")
                for path in lora:
                    layer = self.base.transformer.get_submodule(path)
                    before.setdefault(path, layer.weight.data)
                    layer.weight.data = layer.weight.data + weight * lora.delta(path)
            yield self.base
        finally:
            for path, original in before.items():
                self.base.transformer.get_submodule(path).weight.data = original


def as_image(picture: torch.Tensor, size: int | None = None) -> Image.Image:
    """[3, H, W] in 0..1 -> RGB, enlarged to ``size`` without smoothing."""
    levels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(levels)
    return image.resize((size, size), Image.Resampling.NEAREST) if size else image


def split_prompt(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """A WebUI's prompt: its words, and the names and weights of its ``<lora:name:weight>`` (1 where it has none)."""
    found = []
    for name, weight in _TAG.findall(prompt):
        try:
            found.append((name, float(weight or 1)))
        except ValueError:
            raise UserError(f"<lora:{name}:{weight}>: the weight must be a number.") from None
    return _TAG.sub(" ", prompt).strip(), found


def find_lora(name: str, folder: Path) -> Path:
    """The file that ``<lora:name:…>`` means: NAME.safetensors in the folder or below it. Raises UserError."""
    for path in sorted(folder.rglob("*.safetensors")):
        if path.stem == name:
            return path
    raise UserError(f"There is no LoRA {name!r} in {folder}. Make one: i2l make PICTURE --name {name}.")


def sheet(rows: Sequence[Sequence[Image.Image]], top: Sequence[str] = (), side: int = 128) -> Image.Image:
    """Pictures in rows and columns, with a line of words above each column; shorter rows leave room at the end."""
    gap, head = 6, 18 if any(top) else 0
    columns = max(map(len, rows))
    out = Image.new("RGB", (columns * (side + gap) + gap, head + len(rows) * (side + gap) + gap), "white")
    pen = ImageDraw.Draw(out)
    for column, words in enumerate(top):
        pen.text((gap + column * (side + gap), 4), words, fill="black")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            small = image.resize((side, side), Image.Resampling.NEAREST if image.width < side else Image.Resampling.BOX)
            out.paste(small, (gap + x * (side + gap), head + gap + y * (side + gap)))
    return out


def contact_sheet(
    painter: Painter,
    references: Sequence[Image.Image],
    lora: Lora,
    prompts: Sequence[str] = ("a circle", "a star", "a moon left"),
    weights: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
) -> Image.Image:
    """What the demo shows: the references, then for each prompt the drawing without the LoRA and with it."""
    columns = [
        painter.paint_all(prompts, [seed] * len(prompts), [(lora, weight)] if weight else ())
        for weight in (0, *weights)
    ]
    drawings = [list(row) for row in zip(*columns, strict=True)]
    top = [f"reference: {len(references)}", "without", *(f"weight {weight:g}" for weight in weights)]
    blank = Image.new("RGB", references[0].size, "white")
    shown = [references[n] if n < len(references) else blank for n in range(len(prompts))]
    return sheet([[reference, *row] for reference, row in zip(shown, drawings, strict=True)], top)
