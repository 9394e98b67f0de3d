"""The diffusion transformers whose LoRAs are known: every linear layer by name and shape, generated from tables.

Names are those of diffusers' module tree, which DiffSynth and the WebUIs share for these models.

To add a model family: a file beside these with a function of its sizes that returns an `Architecture`, as
`qwen_image.py`, and a line in `ARCHITECTURES`. `tests/test_converters_consumers.py` compares it with the class in
diffusers. A model of a known family at another size needs only the line.
"""

from .base import Architecture, LayerKind, LayerStack, Module
from .miniature import MINI
from .qwen_image import QWEN_IMAGE, qwen_image
from .z_image import Z_IMAGE, z_image

ARCHITECTURES: dict[str, Architecture] = {arch.id: arch for arch in (QWEN_IMAGE, Z_IMAGE, MINI)}
"""By id. A file that fits several is taken for the one that has most of its modules, the first of equals."""

__all__ = [
    "ARCHITECTURES",
    "MINI",
    "QWEN_IMAGE",
    "Z_IMAGE",
    "Architecture",
    "LayerKind",
    "LayerStack",
    "Module",
    "qwen_image",
    "z_image",
]
