"""Every checkpoint that can be read, and the models that are made of them. Importing this does not import torch: a
WebUI's own process reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from i2l_ext.converters.architectures import HIDREAM_O1, KLEIN_4B, MINI, QWEN_IMAGE, Z_IMAGE, Architecture
from i2l_ext.converters.errors import UserError, unknown_choice
from i2l_ext.converters.files import BYTES
from i2l_ext.converters.generation import OMNI_SETTINGS, QWEN_SETTINGS, V2_SETTINGS, Z_SETTINGS, GenerationSettings
from i2l_ext.decoder import DecoderSpec, ResidualSpec, TransformerSpec
from i2l_ext.encoders import dims, encoder_module

APACHE = "Apache-2.0"
DINO = "Apache-2.0 as re-hosted; upstream: Meta's DINOv3 licence (Built with DINOv3)"


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights. ``kind``: siglip2, dinov3, qwen-vl, heads, bias or template. ``spec`` says how large it is:
    the dims of an encoder, a DecoderSpec, or for a bias, which is a plain LoRA, and for a template, a repository with
    code of its own, the architecture. ``files`` are exact names in
    ``repo``; one that ends in ``.index.json`` stands for the shards it lists. ``repo`` is None for weights that we
    ship. ``parameters`` and ``structure_md5`` are the published figures, where there are any. ``renamed``:
    pattern on the path of a file that is known by its structure only, where several checkpoints have the same."""

    id: str
    kind: str
    spec: Any
    repo: str | None
    files: tuple[str, ...]
    parameters: int
    structure_md5: str | None = None
    dtype: str = "BF16"
    licence: str = APACHE
    renamed: str = ""

    @property
    def places(self) -> list[str]:
        """What to fetch by hand: the repository with each file, an index with its shards, of a template with all."""
        lists = {name: f"{name} and the files that it lists" for name in self.files if name.endswith(".index.json")}
        names = ["*"] if self.kind == "template" else [lists.get(name, name) for name in self.files]
        return [f"{self.repo}/{name}" for name in names]

    @property
    def output(self) -> str:
        """What the embeddings of an encoder are called in the cache: two kinds may come from the same files."""
        return self.id if getattr(self.spec, "pooled", True) else f"{self.id} patches"

    def as_patches(self) -> Checkpoint:
        """The same SigLIP2 with all patch tokens of a picture in place of one vector."""
        return replace(self, spec=replace(self.spec, pooled=False))

    @property
    def nbytes(self) -> int:
        """Bytes to download, without the headers."""
        return self.parameters * BYTES[self.dtype]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """{key: shape} by our own module definitions. Encoders are built on the meta device for it, which imports
        torch. ValueError for a bias and a template, whose keys are not known before."""
        if self.kind == "heads":
            return self.spec.shapes
        if self.kind in ("bias", "template"):
            raise ValueError(f"{self.id}: its keys are not known")
        return encoder_module(self.kind).structure(self.spec)


@dataclass(frozen=True)
class Expert:
    """Heads that write one part of the LoRA. ``view`` is the side in pixels of the square that Qwen-VL sees for
    their residual."""

    heads: Checkpoint
    view: int | None = None


@dataclass(frozen=True)
class I2LModel:
    """What a user chooses: encoders, experts, and perhaps a bias, a LoRA that is always added. ``settings``: how to
    generate with what it makes; None for the miniature, whose command knows them. ``template``: in place of all
    these, a repository with code of its own, which DiffSynth-Studio runs."""

    name: str
    line: str
    arch: Architecture
    siglip2: Checkpoint | None = None
    dinov3: Checkpoint | None = None
    experts: tuple[Expert, ...] = ()
    qwen_vl: Checkpoint | None = None
    bias: Checkpoint | None = None
    settings: GenerationSettings | None = None
    template: Checkpoint | None = None

    @property
    def parts(self) -> tuple[Checkpoint, ...]:
        """Every checkpoint that the model needs."""
        parts = (*self.encoders, *(expert.heads for expert in self.experts), self.bias, self.template)
        return tuple(part for part in parts if part is not None)

    @property
    def encoders(self) -> tuple[Checkpoint, ...]:
        """In the order in which they are computed."""
        return tuple(part for part in (self.siglip2, self.dinov3, self.qwen_vl) if part is not None)

    @property
    def views(self) -> list[int]:
        """The sides in pixels of the squares that Qwen-VL sees."""
        return sorted({expert.view for expert in self.experts if expert.view})

    @property
    def sees_together(self) -> bool:
        """Whether all pictures are seen together, so that no part of the LoRA is that of one of them."""
        return bool(self.template) or any(expert.heads.spec.sees_together for expert in self.experts)

    @property
    def rank(self) -> int:
        """The rank that one picture gives, without the bias; 0 where a template decides it."""
        return sum(expert.heads.spec.rank for expert in self.experts)


ENCODERS = "DiffSynth-Studio/General-Image-Encoders"
QWEN_I2L = "DiffSynth-Studio/Qwen-Image-i2L"
EMBED = dims.SIGLIP2_G384.hidden + dims.DINOV3_7B.hidden

SIGLIP2 = Checkpoint(
    "siglip2-g384", "siglip2", dims.SIGLIP2_G384, ENCODERS, ("SigLIP2-G384/model.safetensors",), 1_163_659_776,
    "469c78b61e3e31bc9eec0d0af3d3f2f8",
)  # fmt: skip
DINOV3 = Checkpoint(
    "dinov3-7b", "dinov3", dims.DINOV3_7B, ENCODERS, ("DINOv3-7B/model.safetensors",), 6_716_035_072,
    "5722b5c873720009de96422993b15682", licence=DINO,
)  # fmt: skip
QWEN_VL = Checkpoint(
    "qwen2.5-vl-7b", "qwen-vl", dims.QWEN25_VL_7B, "Qwen/Qwen-Image",
    ("text_encoder/model.safetensors.index.json",), 8_292_166_656, "8004730443f55db63092006dd9f7110e",
)  # fmt: skip
STYLE = Checkpoint(
    "qwen-image-i2l-style", "heads", DecoderSpec(QWEN_IMAGE, EMBED, compress=64), QWEN_I2L,
    ("Qwen-Image-i2L-Style.safetensors",), 2_406_481_920, "0aad514690602ecaff932c701cb4b0bb",
)  # fmt: skip
COARSE = Checkpoint(
    "qwen-image-i2l-coarse", "heads",
    DecoderSpec(QWEN_IMAGE, EMBED, compress=128, residual=ResidualSpec(length=71, dim=3584, mid=1024)), QWEN_I2L,
    ("Qwen-Image-i2L-Coarse.safetensors",), 7_927_234_560, "a166c33455cdbd89c0888a3645ca5c0f",
)  # fmt: skip
FINE = Checkpoint(
    "qwen-image-i2l-fine", "heads",
    DecoderSpec(QWEN_IMAGE, EMBED, compress=128, residual=ResidualSpec(length=1376, dim=3584, mid=64)), QWEN_I2L,
    ("Qwen-Image-i2L-Fine.safetensors",), 7_573_340_160, "a5476e691767a4da6d3a6634a10f7408",
)  # fmt: skip
BIAS = Checkpoint(
    "qwen-image-i2l-bias", "bias", QWEN_IMAGE, QWEN_I2L, ("Qwen-Image-i2L-Bias.safetensors",), 30_000_000,
)  # fmt: skip
Z_STYLE = Checkpoint(
    "z-image-i2l-style", "heads", DecoderSpec(Z_IMAGE, EMBED, compress=128), "DiffSynth-Studio/Z-Image-i2L",
    ("model.safetensors",), 1_613_234_176, "9510cb8cd1dd34ee0e4f111c24905510", renamed=r"\A(?!.*omni)",
)  # fmt: skip
OMNI_STYLE = replace(
    Z_STYLE, id="z-image-omni-i2l-style", repo="DiffSynth-Studio/Z-Image-Omni-Base-i2L", renamed="omni",
)  # fmt: skip

Z_V2, KLEIN_V2, HIDREAM_V2 = (
    Checkpoint(f"{name}-template", "template", arch, f"DiffSynth-Studio/{repo}", ("model.py",), parameters,
               licence="unknown: see its page")
    for name, arch, repo, parameters in (
        ("z-image-v2", Z_IMAGE, "ZImage-i2L-v2", 1_800_000_000),
        ("klein-4b-v2", KLEIN_4B, "KleinBase4B-i2L-v2", 0),
        ("hidream-o1-v2", HIDREAM_O1, "HidreamO1-i2L-v2", 0),
    )
)  # fmt: skip
"""The authors' later models. A user gave 3.6 GB for the first; the size of the others is not known: 0."""

MINI_EMBED = dims.SIGLIP2_MINI.hidden + dims.DINOV3_MINI.hidden


def _mini(part: str, kind: str, spec: Any, parameters: int, dtype: str = "BF16") -> Checkpoint:
    """A part of the miniature, which we trained and ship."""
    return Checkpoint(f"mini-{part}", kind, spec, None, (f"mini/weights/{part}.safetensors",), parameters, dtype=dtype)


def _mini_residual(side: int, mid: int) -> ResidualSpec:
    return ResidualSpec(dims.QWEN_VL_MINI.tokens(side), dims.QWEN_VL_MINI.hidden, mid)


MINI_SIGLIP2 = _mini("siglip2", "siglip2", dims.SIGLIP2_MINI, 304_704, "F16")
MINI_DINOV3 = _mini("dinov3", "dinov3", dims.DINOV3_MINI, 205_920, "F16")
MINI_QWEN_VL = _mini("qwen_vl", "qwen-vl", dims.QWEN_VL_MINI, 248_128, "F16")
MINI_STYLE = _mini("style_core", "heads", DecoderSpec(MINI, MINI_EMBED, compress=32, rank=24, kind="core"), 2_088_960)
MINI_QUERIES = _mini(
    "queries",
    "heads",
    DecoderSpec(
        MINI, dims.SIGLIP2_MINI.width, compress=50, kind="queries",
        transformer=TransformerSpec(dims.SIGLIP2_MINI.width, 96, depth=2, heads=2, head_dim=48, mlp=192),
    ),
    2_096_384,
)  # fmt: skip
MINI_COARSE = _mini(
    "coarse",
    "heads",
    DecoderSpec(MINI, MINI_EMBED, compress=10, residual=_mini_residual(dims.QWEN_VL_MINI.lowres, 16)),
    1_348_480,
)
MINI_FINE = _mini(
    "fine",
    "heads",
    DecoderSpec(MINI, MINI_EMBED, compress=10, residual=_mini_residual(dims.QWEN_VL_MINI.highres, 6)),
    1_347_280,
)
MINI_BIAS = _mini("bias", "bias", MINI, 102_400)

_COARSE, _FINE = Expert(COARSE, view=224), Expert(FINE, view=1024)
_MINI_COARSE = Expert(MINI_COARSE, view=dims.QWEN_VL_MINI.lowres)
_MINI_FINE = Expert(MINI_FINE, view=dims.QWEN_VL_MINI.highres)

MODELS: dict[str, I2LModel] = {
    model.name: model
    for model in (
        I2LModel("mini", "the built-in miniature, to try everything: the style of the pictures", MINI,
              MINI_SIGLIP2, MINI_DINOV3, (Expert(MINI_STYLE),)),
        I2LModel("mini-queries", "the miniature: all pictures seen together, after the authors' later paper", MINI,
              MINI_SIGLIP2.as_patches(), experts=(Expert(MINI_QUERIES),)),
        I2LModel("mini-coarse", "the miniature: style and rough content", MINI,
              MINI_SIGLIP2, MINI_DINOV3, (_MINI_COARSE,), MINI_QWEN_VL),
        I2LModel("mini-coarse-fine", "the miniature: style, content and its details", MINI,
              MINI_SIGLIP2, MINI_DINOV3, (_MINI_COARSE, _MINI_FINE), MINI_QWEN_VL),
        I2LModel("mini-coarse-fine-bias", "the same, corrected towards the miniature's normal images", MINI,
              MINI_SIGLIP2, MINI_DINOV3, (_MINI_COARSE, _MINI_FINE), MINI_QWEN_VL, MINI_BIAS),
        I2LModel("qwen-image-style", "the style of the pictures, for any content", QWEN_IMAGE,
              SIGLIP2, DINOV3, (Expert(STYLE),), settings=QWEN_SETTINGS),
        I2LModel("qwen-image-coarse", "style and rough content; the authors advise against it alone", QWEN_IMAGE,
              SIGLIP2, DINOV3, (_COARSE,), QWEN_VL, settings=QWEN_SETTINGS),
        I2LModel("qwen-image-coarse-fine", "style, content and its details", QWEN_IMAGE,
              SIGLIP2, DINOV3, (_COARSE, _FINE), QWEN_VL, settings=QWEN_SETTINGS),
        I2LModel("qwen-image-coarse-fine-bias", "the same, corrected towards the base's normal images", QWEN_IMAGE,
              SIGLIP2, DINOV3, (_COARSE, _FINE), QWEN_VL, BIAS, QWEN_SETTINGS),
        I2LModel("z-image-style", "the style of the pictures, for Z-Image (base, not Turbo)", Z_IMAGE,
              SIGLIP2, DINOV3, (Expert(Z_STYLE),), settings=Z_SETTINGS),
        I2LModel("z-image-omni-base-style", "the style of the pictures, for Z-Image-Omni-Base", Z_IMAGE,
              SIGLIP2, DINOV3, (Expert(OMNI_STYLE),), settings=OMNI_SETTINGS),
        I2LModel("z-image-v2", "the style of the pictures, for Z-Image; runs through DiffSynth-Studio", Z_IMAGE,
              settings=V2_SETTINGS, template=Z_V2),
        I2LModel("klein-4b-v2", "the style of the pictures, for FLUX.2 klein base 4B; runs through DiffSynth-Studio",
              KLEIN_4B, settings=V2_SETTINGS, template=KLEIN_V2),
        I2LModel("hidream-o1-v2", "the style of the pictures, for HiDream-O1; runs through DiffSynth-Studio",
              HIDREAM_O1, settings=V2_SETTINGS, template=HIDREAM_V2),
    )
}  # fmt: skip
"""By name, in the order in which they are shown. The repositories of v2 ship code of their own: it runs only in a
process of DiffSynth-Studio's, shut in, and only once the user has agreed to its hash (``i2l_ext.v2_models``)."""

REFUSED = {
    "qwen-image-fine": "Fine only adds detail to what Coarse wrote: choose qwen-image-coarse-fine.",
    "qwen-image-bias": "Bias only corrects Coarse and Fine together: choose qwen-image-coarse-fine-bias.",
}


def find(name: str) -> I2LModel:
    """The model of that name. Raises UserError, which lists the names, where there is none."""
    if name in REFUSED:
        raise UserError(f"{name} cannot be used alone. {REFUSED[name]}")
    if name not in MODELS:
        raise unknown_choice("model", name, [*MODELS])
    return MODELS[name]
