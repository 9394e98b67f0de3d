"""Key dialects: how each tool names the factors of a LoRA. All are read; those in `DIALECTS` are also written.

A key is PREFIX + MODULE + SUFFIX. Prefixes and suffixes are tables; the modules are those of an architecture, with
dots or with underscores. Only names and shapes are looked at here: neither torch nor the data are needed.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from .architectures import ARCHITECTURES, Architecture
from .errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dialect:
    """One way to write the keys of a LoRA.

    ``dotted``: the module's name keeps its dots; ``native``: it is the name in the model's first implementation,
    where that has fused layers (`Architecture.fused`, `Architecture.renamed`).
    """

    name: str
    prefix: str
    down: str
    up: str
    alpha: str | None = None
    dotted: bool = True
    native: bool = False
    readers: str = ""

    def keys(self, path: str) -> tuple[str, str, str | None]:
        """The keys of a module's down factor, up factor and alpha (None where the dialect has none)."""
        stem = self.prefix + (path if self.dotted else path.replace(".", "_"))
        return stem + self.down, stem + self.up, stem + self.alpha if self.alpha else None


_PEFT = (".lora_A.weight", ".lora_B.weight")
_KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "webui", "diffusion_model.", *_PEFT, readers="Forge Neo, ComfyUI, ai-toolkit, DiffSynth-Studio, diffusers"
        ),
        Dialect("kohya", "lora_unet_", *_KOHYA, dotted=False, readers="musubi-tuner, sd-scripts, ComfyUI"),
        Dialect("diffusers", "transformer.", *_PEFT, readers="diffusers, PEFT, ai-toolkit, Forge Neo, ComfyUI"),
        Dialect("diffsynth", "", ".lora_A.default.weight", ".lora_B.default.weight", readers="DiffSynth-Studio"),
        Dialect(
            "kohya-fused",
            "lora_unet_",
            *_KOHYA,
            dotted=False,
            native=True,
            readers="Forge Neo for Z-Image, where plain kohya is refused",
        ),
    )
}
"""What is written. ``kohya-fused`` is ``kohya`` but for Z-Image, whose q, k and v it writes as one layer."""
DEFAULT = "webui"

VARIANTS: tuple[Dialect, ...] = (
    Dialect("flymyai", "transformer.", ".lora.down.weight", ".lora.up.weight"),
    Dialect("bare", "", *_PEFT),
    Dialect("peft", "base_model.model.", *_PEFT),
    Dialect("lycoris", "lycoris_", *_KOHYA, dotted=False),
)
"""What is only read, by the name that a report gives it; any further mix of a prefix and a suffix is "other"."""

PREFIXES = (
    "base_model.model.diffusion_model.",
    "base_model.model.transformer.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "dit.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "",
)
"""What stands before the module's name, longest first where one begins another."""

SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_down": "down",
    ".lora_up": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
"""What stands behind the module's name, and which part of the pair it is."""

UNSUPPORTED = {
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.(dora_scale|lora_magnitude_vector|magnitude)": "DoRA",
    r"\.lora_mid": "a convolution's LoRA (lora_mid)",
    r"\.b?oft_": "OFT",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.ia3_": "IA3",
    r"\.diff_b$": "a bias difference (diff_b)",
    r"\.diff$": "a full difference (diff)",
    r"\.lora_[AB]\.(default\.)?bias$": "LoRA biases",
    r"\.(weight_scale|scale_weight|scaled_fp8|lora_(A|B|up|down)\.scale)": "scaled fp8",
}
"""What marks a network that is not a plain LoRA, as a pattern. Such keys are named and refused, never dropped."""

OTHER_MODELS = {
    r"single_transformer_blocks|(single|double)_blocks": "FLUX or HunyuanVideo",
    r"joint_blocks": "Stable Diffusion 3",
    r"(down|up|input|output)_blocks|mid_block|middle_block": "Stable Diffusion",
    r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)": "Wan",
}
"""What marks a model that is none of ours. FLUX shares module names and even shapes with Qwen-Image."""

TEXT_ENCODER = ("lora_te", "text_encoder", "te_", "lora_llm", "conditioner.", "text_model.")


@dataclass(frozen=True)
class Slot:
    """Where one module's factors lie in a file, and in which dialect. ``rows`` is the slice of the up factor's rows
    that are the module's, where the file holds a fused layer."""

    down: str
    up: str
    alpha: str | None = None
    rows: tuple[int, int] | None = None
    dialect: str = "other"


@dataclass(frozen=True)
class Reading:
    """What the keys of a file say.

    ``slots`` by module path, in the architecture's order; ``foreign``: keys that are no part of this architecture;
    ``halves``: modules of which a factor is missing; ``dialects``: how many keys are in which dialect.
    """

    arch: Architecture
    slots: dict[str, Slot]
    dialects: dict[str, int]
    foreign: tuple[str, ...] = ()
    text_encoder: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()

    @property
    def dialect(self) -> str:
        """The name of the dialect or variant, "mixed" where there are several, "other" where it has no name."""
        return next(iter(self.dialects)) if len(self.dialects) == 1 else "mixed"


class _Key(NamedTuple):
    """A key taken apart. (A tuple, as thousands are made for a file.)"""

    key: str
    prefix: str
    stem: str
    suffix: str

    @property
    def part(self) -> str:
        return SUFFIXES[self.suffix]


_SUFFIX = re.compile(rf"(?:{'|'.join(map(re.escape, SUFFIXES))})\Z")


def _split(key: str) -> list[_Key]:
    """Every way to take a key apart, the longest prefix first; none where it is no LoRA key.

    The suffix is the longest that fits: that is the match which begins first.
    """
    suffix = _SUFFIX.search(key)
    if suffix is None:
        return []
    stem = key[: suffix.start()]
    return [_Key(key, prefix, stem[len(prefix) :], suffix[0]) for prefix in PREFIXES if stem.startswith(prefix)]


Target = tuple[str, "tuple[int, int] | None"]
"""A module, and its rows where it is a part of a fused layer."""


@dataclass(frozen=True)
class _Spelling:
    """A name in a key: the modules it stands for, each with its rows where it is a fused layer.

    ``dotted`` and ``native`` as in Dialect; None where the name is the same either way.
    """

    targets: tuple[Target, ...]
    dotted: bool | None
    native: bool | None

    def suits(self, dialect: Dialect) -> bool:
        return self.dotted in (None, dialect.dotted) and self.native in (None, dialect.native)


@dataclass(frozen=True)
class Layer:
    """A layer as an implementation has it: its name and the modules of ours whose rows it stacks."""

    name: str
    paths: tuple[str, ...]


@cache
def native_layers(arch_id: str) -> dict[str, Layer]:
    """The layers of the first implementation that differ from ours, by the path of each of our modules."""
    arch = ARCHITECTURES[arch_id]
    layers: dict[str, Layer] = {}
    for path in arch.modules:
        for other, ours in (arch.renamed or {}).items():
            if path == ours or path.endswith("." + ours):
                layers[path] = Layer(path.removesuffix(ours) + other, (path,))
        for fused, kinds in (arch.fused or {}).items():
            if path.endswith("." + kinds[0]):
                stem = path.removesuffix(kinds[0])
                layer = Layer(stem + fused, tuple(stem + kind for kind in kinds))
                layers |= dict.fromkeys(layer.paths, layer)
    return layers


@cache
def _spellings(arch_id: str) -> dict[str, _Spelling]:
    """Every name of the architecture's modules, dotted or underscored, ours or native."""
    arch, native = ARCHITECTURES[arch_id], native_layers(arch_id)
    named: dict[str, tuple[tuple[Target, ...], bool | None]]
    named = {path: (((path, None),), False if path in native else None) for path in arch.modules}
    for layer in native.values():
        start, parts = 0, list[Target]()
        for path in layer.paths:
            end = start + arch.modules[path].shape[0]
            parts.append((path, (start, end) if len(layer.paths) > 1 else None))
            start = end
        named[layer.name] = (tuple(parts), True)
    spellings: dict[str, _Spelling] = {}
    for name, (targets, is_native) in named.items():
        flat = name.replace(".", "_")
        spellings[name] = _Spelling(targets, None if flat == name else True, is_native)
        spellings.setdefault(flat, _Spelling(targets, False, is_native))
    return spellings


def spelled(name: str, arch: Architecture) -> str | None:
    """The path of the one module that a name stands for, with dots or underscores and any known prefix; else None."""
    names = _spellings(arch.id)
    for prefix in PREFIXES:
        spelling = names.get(name[len(prefix) :]) if name.startswith(prefix) else None
        if spelling and len(spelling.targets) == 1:
            return spelling.targets[0][0]
    return None


def _dialects_of(key: _Key, spelling: _Spelling) -> list[str]:
    """The dialects in which a down or up key may be: several where a name is the same in them."""
    return [
        dialect.name
        for dialect in (*DIALECTS.values(), *VARIANTS)
        if key.prefix == dialect.prefix and key.suffix in (dialect.down, dialect.up) and spelling.suits(dialect)
    ] or ["other"]


def _fits(
    slot: Slot, path: str, arch: Architecture, shapes: Mapping[str, Shape], width: Mapping[str, int]
) -> str | None:
    """Why the factors cannot be this module's, or None."""
    d_out, d_in = arch.modules[path].shape
    down, up = shapes[slot.down], shapes[slot.up]
    if len(down) != 2 or len(up) != 2:
        return f"its factors are {list(down)} and {list(up)}, not matrices"
    d_out = width.get(slot.up, d_out)
    if down[1] != d_in or up[0] != d_out:
        return f"it maps {down[1]} to {up[0]}, not {d_in} to {d_out}"
    if down[0] != up[1] or down[0] == 0:
        return f"its factors have ranks {down[0]} and {up[1]}"
    if slot.alpha and math.prod(shapes[slot.alpha]) != 1:
        return "its alpha is not a number"
    return None


def parse(shapes: Mapping[str, Shape], name: str) -> Reading:
    """Read the keys of a LoRA file, given {key: shape}. ``name`` is the file's, for messages.

    Raises UserError where this is not a LoRA, one of an unknown kind, of an unknown model, or where a module stands
    in it twice.
    """
    unsupported = re.compile("|".join(UNSUPPORTED))
    for key in shapes:
        if unsupported.search(key):
            kind = next(kind for mark, kind in UNSUPPORTED.items() if re.search(mark, key))
            raise UserError(f"{name}: holds {kind}, which is not supported (key {key!r}). Only plain LoRA is.")
    split = {key: _split(key) for key in shapes}
    if not any(split.values()):
        seen = next(iter(shapes), None)
        raise UserError(f"{name}: not a LoRA: " + (f"no LoRA keys (first key {seen!r})." if seen else "it is empty."))
    candidates = [_parse_as(arch, split, name) for arch in ARCHITECTURES.values()]
    readings = [reading for reading in candidates if reading.slots or reading.halves]
    fitting = [r for r in readings if not _misfits(r, shapes) and not _other_model(r)]
    if not fitting:
        raise UserError(_strange(readings, shapes, next(key for key, ways in split.items() if ways), name))
    return max(fitting, key=lambda reading: len(reading.slots))


def _parse_as(arch: Architecture, split: Mapping[str, list[_Key]], name: str) -> Reading:
    names = _spellings(arch.id)
    found: dict[str, dict[str, _Key]] = defaultdict(dict)
    rows: dict[str, tuple[int, int] | None] = {}
    spoken: dict[str, list[str]] = {}
    foreign, text_encoder = list[str](), list[str]()
    for key, ways in split.items():
        taken = next((way for way in ways if way.stem in names), None)
        if taken is None:
            (text_encoder if key.startswith(TEXT_ENCODER) else foreign).append(key)
            continue
        spelling = names[taken.stem]
        if taken.part != "alpha":
            spoken[key] = _dialects_of(taken, spelling)
        for path, slice_ in spelling.targets:
            if taken.part in found[path]:
                first = found[path][taken.part].key
                raise UserError(f"{name}: the module {path} stands in it twice ({first!r} and {key!r}).")
            found[path][taken.part] = taken
            rows[path] = slice_
    # Names that are the same in several dialects are taken to be in the one that explains the whole file.
    common = [dialect for dialect in next(iter(spoken.values()), ()) if all(dialect in o for o in spoken.values())]
    dialect_of = {key: (common or options)[0] for key, options in spoken.items()}
    slots, halves = {}, []
    for path in (path for path in arch.modules if path in found):
        pair = {part: key.key for part, key in found[path].items()}
        if "down" in pair and "up" in pair:
            slots[path] = Slot(pair["down"], pair["up"], pair.get("alpha"), rows[path], dialect_of[pair["up"]])
        else:
            halves.append(path)
    counts = dict(Counter(dialect_of.values()).most_common())
    return Reading(arch, slots, counts, tuple(foreign), tuple(text_encoder), tuple(halves))


def _other_model(reading: Reading) -> str | None:
    """Why a file whose names and shapes would fit is of another model all the same, or None."""
    for key in reading.foreign:
        for mark, title in OTHER_MODELS.items():
            if re.search(mark, key):
                return f"{key!r} is of {title}"
        for stack in reading.arch.stacks:
            block = re.search(rf"(^|[._]){stack.name}[._](\d+)[._]", key)
            if block and int(block[2]) >= stack.depth:
                return f"{key!r} is beyond the {stack.depth} blocks of {reading.arch.title}"
    return None


def _misfits(reading: Reading, shapes: Mapping[str, Shape]) -> list[tuple[str, str]]:
    width: dict[str, int] = defaultdict(int)
    for slot in reading.slots.values():
        if slot.rows:
            width[slot.up] = max(width[slot.up], slot.rows[1])
    reasons = ((path, _fits(slot, path, reading.arch, shapes, width)) for path, slot in reading.slots.items())
    return [(path, reason) for path, reason in reasons if reason]


def _strange(readings: Iterable[Reading], shapes: Mapping[str, Shape], first: str, name: str) -> str:
    """One line for a LoRA of no known architecture: what was seen (its ``first`` key), beside the nearest we know."""
    known = ", ".join(arch.title for arch in ARCHITECTURES.values())
    named = [reading for reading in readings if reading.slots]
    other = next((reason for reading in named if (reason := _other_model(reading))), None)
    if other or not named:
        other = other or f"key {first!r}, shape {list(shapes[first])}"
        return f"{name}: a LoRA of another model ({other}). Known: {known}."
    nearest = min(named, key=lambda reading: len(_misfits(reading, shapes)))
    path, reason = _misfits(nearest, shapes)[0]
    return f"{name}: has the names of {nearest.arch.title} but not its shapes: {path}: {reason}. Known: {known}."
