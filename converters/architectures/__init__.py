"""The diffusion transformers whose LoRAs are known: every linear layer by name and shape, generated from tables.

Names are those of diffusers' module tree, which DiffSynth and the WebUIs share for these models; where a model's first
implementation has others, they stand in `Architecture.native`.

To add a model family: a file beside these with a function of its sizes that returns an `Architecture`, as
`qwen_image.py`, and a line in `ARCHITECTURES`. `tests/test_converters_architectures.py` compares it with the class in
diffusers. A model of a known family at another size needs only the line.
"""

from .base import Architecture, LayerKind, LayerStack, Module
from .flux import FLUX, flux
from .flux2 import FLUX2_DEV, KLEIN_4B, KLEIN_9B, flux2
from .hidream_o1 import HIDREAM_O1, hidream_o1
from .miniature import MINI
from .qwen_image import QWEN_IMAGE, qwen_image
from .z_image import Z_IMAGE, z_image

ARCHITECTURES: dict[str, Architecture] = {
    arch.id: arch for arch in (QWEN_IMAGE, Z_IMAGE, FLUX, KLEIN_4B, KLEIN_9B, FLUX2_DEV, HIDREAM_O1, MINI)
}
"""By id. A file that fits several is taken for the one that has most of its modules, the first of equals."""

__all__ = [
    "ARCHITECTURES",
    "FLUX",
    "FLUX2_DEV",
    "HIDREAM_O1",
    "KLEIN_4B",
    "KLEIN_9B",
    "MINI",
    "QWEN_IMAGE",
    "Z_IMAGE",
    "Architecture",
    "LayerKind",
    "LayerStack",
    "Module",
    "flux",
    "flux2",
    "hidream_o1",
    "qwen_image",
    "z_image",
]
