"""The part of a LoRA file that changes a text encoder: which encoder and layer its keys name, in each key format.

A program has names for some encoders of some models only; what it has no name for is left out of a file for it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from . import scales
from .errors import UserError
from .files import FLOAT_LIMITS
from .key_formats import KEY_FORMATS, SUFFIXES, TEXT_ENCODER, KeyFormat, ends_with

if TYPE_CHECKING:
    from .files import TensorFile
    from .lora import Pair
    from .precision import Losses

_SEP = "[._]"
LAYOUTS = {
    "CLIP": (
        rf"text_model{_SEP}encoder{_SEP}layers{_SEP}(\d+){_SEP}(self_attn|mlp){_SEP}([qkv]_proj|out_proj|fc[12])",
        r"text_model.encoder.layers.\1.\2.\3",
    ),
    "T5": (
        rf"encoder{_SEP}block{_SEP}(\d+){_SEP}layer{_SEP}(\d+){_SEP}(SelfAttention|DenseReluDense){_SEP}([qkvo]|wi_[01]|wo)",
        r"encoder.block.\1.layer.\2.\3.\4",
    ),
    "language model": (
        rf"(?:model{_SEP}|language_model{_SEP})*layers{_SEP}(\d+){_SEP}(self_attn|mlp){_SEP}([qkvo]_proj|(?:gate|up|down)_proj)",
        r"model.layers.\1.\2.\3",
    ),
}
"""Kind of text encoder -> pattern of a layer's name with dots or underscores, and the name with dots."""


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a model. ``layout``: a key of `LAYOUTS`; ``component``: of diffusers' pipeline; ``read``: the
    prefixes of its layers' names in files; ``written``: the prefix by key format, where the key format has one."""

    title: str
    layout: str
    component: str
    read: tuple[str, ...]
    written: Mapping[str, str] = field(hash=False)


def _encoder(
    title: str, layout: str, comfyui: str, component: str, flat: tuple[str, ...], **written: str
) -> TextEncoder:
    """``comfyui``: its name there."""
    generic = f"text_encoders.{comfyui}.transformer."
    return TextEncoder(title, layout, component, (generic, f"{component}.", *flat), {"webui": generic, **written})


def _only(title: str, comfyui: str) -> tuple[TextEncoder, ...]:
    return (_encoder(title, "language model", comfyui, "text_encoder", ("lora_te_", "lora_te1_")),)


TEXT_ENCODERS: dict[str, tuple[TextEncoder, ...]] = {
    "flux": (
        _encoder(
            "CLIP-L", "CLIP", "clip_l", "text_encoder", ("lora_te_", "lora_te1_"),
            diffusers="text_encoder.", kohya="lora_te1_",
        ),
        _encoder("T5-XXL", "T5", "t5xxl", "text_encoder_2", ("lora_te2_", "lora_te3_"), kohya="lora_te3_"),
    ),
    "qwen-image": _only("Qwen2.5-VL 7B", "qwen25_7b"),
    "z-image": _only("Qwen3 4B", "qwen3_4b"),
    "flux2-klein-4b": _only("Qwen3 4B", "qwen3_4b"),
    "flux2-klein-9b": _only("Qwen3 8B", "qwen3_8b"),
    "flux2-dev": _only("Mistral 3 24B", "mistral3_24b"),
}  # fmt: skip
"""By an architecture's id. Names: read in the source of ComfyUI 0.33 (``model_lora_keys_clip``) and diffusers 0.42."""

_SUFFIX = ends_with(SUFFIXES)


@dataclass(frozen=True)
class TextLayer:
    """A layer of a text encoder, ``name`` with dots; its keys in the file by part: down, up, alpha. ``shape``: (d_out,
    d_in) of its weight; ``dtype``: of its factors, by the format's name."""

    encoder: TextEncoder
    name: str
    keys: Mapping[str, str]
    shape: tuple[int, int] = (0, 0)
    rank: int = 0
    scale: float = 1.0
    dtype: str = "F32"


def text_layers(arch_id: str, names: Iterable[str]) -> tuple[list[TextLayer], list[str]]:
    """The layers that keys of a text encoder name, and the keys that name none or lack a factor."""
    found: dict[tuple[TextEncoder, str], dict[str, str]] = defaultdict(dict)
    rest = []
    for key in names:
        suffix = _SUFFIX.search(key)
        named = suffix and _layer(TEXT_ENCODERS.get(arch_id, ()), key[: suffix.start()])
        if suffix and named and SUFFIXES[suffix[1]] not in found[named]:
            found[named][SUFFIXES[suffix[1]]] = key
        else:
            rest.append(key)
    layers = []
    for (encoder, name), keys in found.items():
        if {"down", "up"} <= keys.keys():
            layers.append(TextLayer(encoder, name, keys))
        else:
            rest += keys.values()
    return layers, rest


def _layer(encoders: Iterable[TextEncoder], stem: str) -> tuple[TextEncoder, str] | None:
    for encoder in encoders:
        pattern, name = LAYOUTS[encoder.layout]
        for prefix in encoder.read:
            if stem.startswith(prefix) and (match := re.fullmatch(pattern, stem[len(prefix) :])):
                return encoder, match.expand(name)
    return None


def describe_text_encoder(keys: Iterable[str]) -> str | None:
    """What keys are that are a text encoder's, for a person, such as ``72 layers of CLIP``; None where some are not."""
    keys = list(keys)
    if not all(key.startswith(TEXT_ENCODER) for key in keys):
        return None
    stems = dict.fromkeys(key[: suffix.start()] for key in keys if (suffix := _SUFFIX.search(key)))
    found = (
        next((layout for layout, (name, _) in LAYOUTS.items() if re.search(rf"{name}\Z", stem)), None) for stem in stems
    )
    named = [f"{count} layers of a {layout}" for layout, count in Counter(found).items() if layout]
    return " and ".join(named) or f"{len(stems)} layers of an unknown one"


@dataclass(frozen=True)
class TextEncoderPart:
    """The text encoders' part of an open file. ``layers``: by name; ``rest``: keys of none, or not usable ones.
    ``dtype``: of the factors, that of the file unless given; ``losses``: what a cast to it loses."""

    file: TensorFile
    layers: Mapping[str, TextLayer]
    rest: tuple[str, ...]
    dtype: str | None = None
    losses: Losses | None = None

    def written(self, key_format: str) -> Iterator[tuple[KeyFormat, TextLayer]]:
        """The layers that a key format has names for, and how it writes them."""
        for layer in self.layers.values():
            prefix = layer.encoder.written.get(key_format.removesuffix("-fused"))
            if prefix is not None:
                yield replace(KEY_FORMATS[key_format], prefix=prefix), layer

    def line(self, key_format: str | None) -> str:
        """What a file in ``key_format`` keeps of it and what not, for a person; None keeps nothing."""
        kept = {id(layer) for _, layer in self.written(key_format)} if key_format else set()
        parts = []
        for title in dict.fromkeys(layer.encoder.title for layer in self.layers.values()):
            layers = [layer for layer in self.layers.values() if layer.encoder.title == title]
            what = "kept" if id(layers[0]) in kept else f"not carried over: {key_format} has no names for them"
            what = what if key_format else "not carried over"
            parts.append(f"{len(layers)} text-encoder layers ({title}) are {what}")
        if self.rest:
            parts.append(f"{len(self.rest)} text-encoder keys are not carried over: {self.rest[0]}")
        return "; ".join(parts)

    def load(self, name: str) -> Pair:
        """The factors of a layer, float32: down [rank, d_in], up [d_out, rank] with the scale in it."""
        layer = self.layers[name]
        down, up = (self.file.tensor(layer.keys[part]).float() for part in ("down", "up"))
        return down, up * layer.scale


def read_text_encoders(file: TensorFile, arch_id: str, names: Iterable[str]) -> TextEncoderPart:
    """The part of an open file of a known model whose keys, ``names``, are a text encoder's."""
    layers, rest = text_layers(arch_id, names)
    usable = []
    for layer in layers:
        try:
            usable.append(_measured(file, layer))
        except (ValueError, UserError):
            rest += layer.keys.values()
    return TextEncoderPart(file, {layer.name: layer for layer in usable}, tuple(rest))


def _measured(file: TensorFile, layer: TextLayer) -> TextLayer:
    """The layer with its shape and scale. Raises ValueError or UserError where they are not usable."""
    down, up = (file.info(layer.keys[part]) for part in ("down", "up"))
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise ValueError("no factors")
    if not {down.dtype, up.dtype} <= {*FLOAT_LIMITS}:
        raise ValueError("no floats")
    rank, scale = down.shape[0], 1.0
    if "alpha" in layer.keys:
        scale = file.number(layer.keys["alpha"]) / rank
    elif config := scales.adapter_config(file, layer.encoder.component)[0]:
        scale = config.scale(layer.name, rank)
    if not scale or not math.isfinite(scale):
        raise ValueError("no scale")
    dtype = down.dtype if down.dtype == up.dtype and not down.dtype.startswith("F8") else "F32"
    return replace(layer, shape=(up.shape[0], down.shape[1]), rank=rank, scale=scale, dtype=dtype)
