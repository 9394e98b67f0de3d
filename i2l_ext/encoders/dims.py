"""How large the encoders are, and in which dtypes they can be computed: the real ones, and those of the miniature.

Importing this does not import torch, so that a WebUI's own process can read it.
"""

from __future__ import annotations

from dataclasses import dataclass

WIDE_DTYPES = ("bfloat16", "float32")
"""The dtypes, by torch's names, in which no encoder overflows."""


@dataclass(frozen=True)
class SiglipDims:
    """A SigLIP vision tower with an attention-pooled head; pictures of ``image`` x ``image`` pixels. ``pooled``:
    whether a picture's embedding is the vector of that head, or the normed tokens of all patches."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    patch: int
    image: int
    pooled: bool = True
    safe_dtypes: tuple[str, ...] = (*WIDE_DTYPES, "float16")
    """Dtypes in which nothing overflows."""

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def width(self) -> int:
        """Numbers in an embedding."""
        return self.hidden


@dataclass(frozen=True)
class Dinov3Dims:
    """A DINOv3 vision transformer with a gated MLP; pictures of ``image`` x ``image`` pixels."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    patch: int
    image: int
    registers: int = 4
    safe_dtypes: tuple[str, ...] = WIDE_DTYPES
    """Dtypes in which nothing overflows. Its authors do not support float16."""

    @property
    def tokens(self) -> int:
        return 1 + self.registers + (self.image // self.patch) ** 2

    @property
    def width(self) -> int:
        """Numbers in an embedding."""
        return self.hidden


@dataclass(frozen=True)
class QwenVLDims:
    """Qwen2.5-VL as a picture encoder: language model, vision tower, and the prompt around the picture.

    ``template`` holds the prompt's token ids, with ``image_token`` once in place of the picture. The first ``drop`` of
    the last hidden states are left out. ``lowres`` and ``highres`` are the sides, in pixels, of the two square
    views (Coarse and Fine).
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    mrope: tuple[int, int, int]
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    full_attention: tuple[int, ...]
    template: tuple[int, ...]
    image_token: int
    drop: int
    lowres: int = 224
    highres: int = 1024
    patch: int = 14
    merge: int = 2
    window: int = 112
    safe_dtypes: tuple[str, ...] = WIDE_DTYPES
    """Dtypes in which nothing overflows: some hidden states are beyond float16's 65,504."""

    @property
    def width(self) -> int:
        """Numbers in a token."""
        return self.hidden

    def grid(self, side: int) -> int:
        """Image tokens along one side of a square view of ``side`` pixels, each of merge x merge patches.

        As Qwen's ``smart_resize`` rounds it for squares inside the processor's limits (56 to 3,584 pixels).
        """
        return round(side / (self.patch * self.merge))

    def patches(self, side: int) -> int:
        return (self.grid(side) * self.merge) ** 2

    def tokens(self, side: int) -> int:
        """Tokens kept of a view of ``side`` pixels."""
        return self.grid(side) ** 2 + len(self.template) - 1 - self.drop


SIGLIP2_G384 = SiglipDims(hidden=1536, layers=40, heads=16, mlp=6144, patch=16, image=384)

DINOV3_7B = Dinov3Dims(hidden=4096, layers=40, heads=32, mlp=8192, patch=16, image=224)

QWEN_IMAGE_EDIT = (
    151644, 8948, 198, 74785, 279, 1376, 4419, 315, 279, 1946, 2168, 320, 3423, 11, 6083, 11, 1379, 11,
    10434, 11, 6171, 11, 4004, 701, 1221, 10339, 1246, 279, 1196, 594, 1467, 7600, 1265, 11596, 476, 5602,
    279, 2168, 13, 19813, 264, 501, 2168, 429, 20027, 279, 1196, 594, 8502, 1393, 20337, 28137, 448, 279,
    4024, 1946, 1380, 8311, 13, 151645, 198, 151644, 872, 198, 151652, 151655, 151653, 151645, 198, 151644,
    77091, 198,
)  # fmt: skip
"""The edit prompt of Qwen-Image with one picture (151655) and an empty user text, in Qwen2.5's vocabulary.

A test writes it as text and tokenises it with the real vocabulary. 64 tokens come before the picture's own.
"""

QWEN25_VL_7B = QwenVLDims(
    hidden=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    mlp=18944,
    vocab=152064,
    mrope=(16, 24, 24),
    vision_hidden=1280,
    vision_layers=32,
    vision_heads=16,
    vision_mlp=3420,
    full_attention=(7, 15, 23, 31),
    template=QWEN_IMAGE_EDIT,
    image_token=151655,
    drop=64,
)

SIGLIP2_MINI = SiglipDims(hidden=96, layers=2, heads=4, mlp=288, patch=8, image=64)

DINOV3_MINI = Dinov3Dims(hidden=96, layers=2, heads=4, mlp=192, patch=8, image=64)

QWEN_VL_MINI = QwenVLDims(
    hidden=64,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp=128,
    vocab=16,
    mrope=(4, 6, 6),
    vision_hidden=64,
    vision_layers=2,
    vision_heads=2,
    vision_mlp=128,
    full_attention=(0, 1),
    template=(1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 10, 11),
    image_token=0,
    drop=4,
    lowres=32,
    highres=64,
    patch=4,
    window=32,
)
"""The same prompt in a vocabulary of a few tokens: four are dropped, then vision_start, the picture, six more."""
