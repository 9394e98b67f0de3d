"""A model of every variant, small and with random weights, in a models folder of its own.

In a file of its own, as there are two of the name conftest.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.lora import Lora
from i2l_ext.decoder import DecoderSpec, ResidualSpec
from i2l_ext.models.catalogue import Checkpoint, Expert, I2LModel
from small_encoders import DINOV3, QWEN_VL, SIGLIP, save, weights

EMBED = SIGLIP.width + DINOV3.width
COARSE, FINE = (ResidualSpec(QWEN_VL.tokens(side), QWEN_VL.width, 4) for side in (QWEN_VL.lowres, QWEN_VL.highres))


def checkpoint(id, kind, spec):
    return Checkpoint(id, kind, spec, "test/small", (f"{id}.safetensors",), parameters=1_000_000)


def heads(id, residual=None):
    return checkpoint(id, "heads", DecoderSpec(MINI, EMBED, compress=8, residual=residual))


SEE = checkpoint("small-siglip2", "siglip2", SIGLIP), checkpoint("small-dinov3", "dinov3", DINOV3)
QWEN = checkpoint("small-qwen", "qwen-vl", QWEN_VL)
COARSE_FINE = (
    Expert(heads("small-coarse", COARSE), QWEN_VL.lowres),
    Expert(heads("small-fine", FINE), QWEN_VL.highres),
)
BIAS = checkpoint("small-bias", "bias", MINI)

SMALL = {
    model.name: model
    for model in (
        I2LModel("small", "for tests", MINI, *SEE, (Expert(heads("small-style")),)),
        I2LModel("small-all", "for tests", MINI, *SEE, COARSE_FINE, QWEN, BIAS),
    )
}


@dataclass(frozen=True)
class World:
    """Where the small models' files lie, and pictures to try them on."""

    models: Path
    pictures: list[Path]

    def file(self, id: str) -> Path:
        return self.models / "test" / "small" / f"{id}.safetensors"


def build(folder: Path) -> World:
    world = World(folder / "models", [])
    for model in SMALL.values():
        for part in model.parts:
            path = world.file(part.id)
            path.parent.mkdir(parents=True, exist_ok=True)
            if part.kind == "bias":
                torch.manual_seed(9)
                pairs = {
                    p: (torch.randn(2, m.shape[1]), torch.randn(m.shape[0], 2)) for p, m in MINI.i2l_modules.items()
                }
                Lora.of(MINI, pairs).save(path, "diffsynth", overwrite=True)
            else:
                save(path, weights(part.shapes, seed=len(part.id)))
    for number in range(3):
        picture = Image.effect_mandelbrot((300 + 40 * number, 200), (-2, -1, 1, 1), 20 + number)
        path = folder / f"picture-{number}.png"
        Image.merge("RGB", [picture, picture.rotate(90 * number), Image.new("L", picture.size, 60 * number)]).save(path)
        world.pictures.append(path)
    return world
