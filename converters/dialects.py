"""Key dialects: how each tool names the factors of a LoRA, read in any of them and written in four.

A key is PREFIX + MODULE + SUFFIX. Prefixes and suffixes are tables; the modules are those of an architecture, with
dots or with underscores. Only names and shapes are looked at here: neither torch nor the data are needed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from .architectures import ARCHITECTURES, Architecture
from .errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dialect:
    """One way to write the keys of a LoRA."""

    name: str
    prefix: str
    down: str
    up: str
    alpha: str | None = None
    dotted: bool = True
    readers: str = ""

    def keys(self, path: str) -> tuple[str, str, str | None]:
        """The keys of a module's down factor, up factor and alpha (None where the dialect has none)."""
        stem = self.prefix + (path if self.dotted else path.replace(".", "_"))
        return stem + self.down, stem + self.up, stem + self.alpha if self.alpha else None


DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "webui",
            "diffusion_model.",
            ".lora_A.weight",
            ".lora_B.weight",
            readers="Forge Neo, ComfyUI, ai-toolkit, DiffSynth-Studio, diffusers",
        ),
        Dialect(
            "kohya",
            "lora_unet_",
            ".lora_down.weight",
            ".lora_up.weight",
            ".alpha",
            dotted=False,
            readers="musubi-tuner, sd-scripts, ComfyUI",
        ),
        Dialect("diffusers", "transformer.", ".lora_A.weight", ".lora_B.weight", readers="diffusers, PEFT, ai-toolkit"),
        Dialect("diffsynth", "", ".lora_A.default.weight", ".lora_B.default.weight", readers="DiffSynth-Studio"),
    )
}
DEFAULT = "webui"

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
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".magnitude": "DoRA",
    ".lora_mid": "a convolution's LoRA (lora_mid)",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".a1.weight": "GLoRA",
    ".ia3_": "IA3",
    ".diff_b": "a bias difference (diff_b)",
    ".diff": "a full difference (diff)",
    ".lora_bias": "LoRA biases",
}
"""What marks a network that is not a plain LoRA. Such keys are named and refused, never dropped."""

TEXT_ENCODER = ("lora_te", "text_encoder", "te_", "lora_llm", "conditioner.", "text_model.")


@dataclass(frozen=True)
class Slot:
    """Where one module's factors lie in a file. ``rows`` is the slice of the up factor's rows that are the module's,
    where the file holds a fused layer."""

    down: str
    up: str
    alpha: str | None = None
    rows: tuple[int, int] | None = None


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
        """The dialect's name, "mixed", or for the variants that we read but do not write "other"."""
        return next(iter(self.dialects)) if len(self.dialects) == 1 else "mixed"


@dataclass(frozen=True)
class _Key:
    """A key taken apart."""

    key: str
    prefix: str
    stem: str
    suffix: str

    @property
    def part(self) -> str:
        return SUFFIXES[self.suffix]


def _split(key: str) -> tuple[str, str] | None:
    """(all before the suffix, the suffix), or None where it is no LoRA key."""
    matches = [suffix for suffix in SUFFIXES if key.endswith(suffix)]
    return (key[: -len(max(matches, key=len))], max(matches, key=len)) if matches else None


@cache
def _spellings(arch_id: str) -> dict[str, tuple[tuple[str, tuple[int, int] | None], ...]]:
    """Every name of the architecture's modules, dotted or underscored: the modules it stands for, with their rows."""
    arch = ARCHITECTURES[arch_id]
    names: dict[str, tuple[tuple[str, tuple[int, int] | None], ...]] = {}
    for path in arch.modules:
        names[path] = ((path, None),)
    for other, ours in (arch.renamed or {}).items():
        for path in arch.modules:
            if path == ours or path.endswith("." + ours):
                names[path.removesuffix(ours) + other] = ((path, None),)
    for fused, kinds in (arch.fused or {}).items():
        for path in arch.modules:
            if not path.endswith("." + kinds[0]):
                continue
            stem, targets, start = path.removesuffix(kinds[0]), [], 0
            for kind in kinds:
                rows = arch.modules[stem + kind].shape[0]
                targets.append((stem + kind, (start, start + rows)))
                start += rows
            names[stem + fused] = tuple(targets)
    return names | {name.replace(".", "_"): targets for name, targets in names.items()}


def _take_apart(key: str, stem: str, suffix: str, names: Mapping[str, object]) -> _Key | None:
    for prefix in PREFIXES:
        if stem.startswith(prefix) and stem[len(prefix) :] in names:
            return _Key(key, prefix, stem[len(prefix) :], suffix)
    return None


def _dialect_of(key: _Key) -> str:
    for dialect in DIALECTS.values():
        dotted = "." in key.stem or key.stem.isalpha()
        if key.prefix == dialect.prefix and key.suffix in (dialect.down, dialect.up) and dotted == dialect.dotted:
            return dialect.name
    return "other"


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
    if slot.alpha and shapes[slot.alpha] not in ((), (1,)):
        return "its alpha is not a number"
    return None


def parse(shapes: Mapping[str, Shape], name: str) -> Reading:
    """Read the keys of a LoRA file, given {key: shape}. ``name`` is the file's, for messages.

    Raises UserError where this is not a LoRA, one of an unknown kind, of an unknown model, or where a module stands
    in it twice.
    """
    for key in shapes:
        for mark, kind in UNSUPPORTED.items():
            if mark in key:
                raise UserError(f"{name}: holds {kind}, which is not supported (key {key!r}). Only plain LoRA is.")
    split = {key: parts for key in shapes if (parts := _split(key))}
    if not split:
        seen = next(iter(shapes), None)
        raise UserError(f"{name}: not a LoRA: " + (f"no LoRA keys (first key {seen!r})." if seen else "it is empty."))
    candidates = [_parse_as(arch, shapes, split, name) for arch in ARCHITECTURES.values()]
    readings = [reading for reading in candidates if reading.slots or reading.halves]
    fitting = [r for r in readings if not _misfits(r, shapes)]
    if not fitting:
        raise UserError(_strange(readings, shapes, split, name))
    return max(fitting, key=lambda reading: len(reading.slots))


def _parse_as(
    arch: Architecture, shapes: Mapping[str, Shape], split: Mapping[str, tuple[str, str]], name: str
) -> Reading:
    names = _spellings(arch.id)
    found: dict[str, dict[str, _Key]] = defaultdict(dict)
    rows: dict[str, tuple[int, int] | None] = {}
    foreign, text_encoder, dialects = [], [], Counter[str]()
    for key in shapes:
        parts = split.get(key)
        taken = _take_apart(key, *parts, names) if parts else None
        if taken is None:
            (text_encoder if key.startswith(TEXT_ENCODER) else foreign).append(key)
            continue
        if taken.part != "alpha":
            dialects[_dialect_of(taken)] += 1
        for path, slice_ in names[taken.stem]:
            if taken.part in found[path]:
                first = found[path][taken.part].key
                raise UserError(f"{name}: the module {path} stands in it twice ({first!r} and {key!r}).")
            found[path][taken.part] = taken
            rows[path] = slice_
    slots, halves = {}, []
    for path in (path for path in arch.modules if path in found):
        pair = {part: key.key for part, key in found[path].items()}
        if "down" in pair and "up" in pair:
            slots[path] = Slot(pair["down"], pair["up"], pair.get("alpha"), rows[path])
        else:
            halves.append(path)
    return Reading(arch, slots, dict(dialects.most_common()), tuple(foreign), tuple(text_encoder), tuple(halves))


def _misfits(reading: Reading, shapes: Mapping[str, Shape]) -> list[tuple[str, str]]:
    width: dict[str, int] = defaultdict(int)
    for slot in reading.slots.values():
        if slot.rows:
            width[slot.up] = max(width[slot.up], slot.rows[1])
    reasons = ((path, _fits(slot, path, reading.arch, shapes, width)) for path, slot in reading.slots.items())
    return [(path, reason) for path, reason in reasons if reason]


def _strange(
    readings: Iterable[Reading], shapes: Mapping[str, Shape], split: Mapping[str, tuple[str, str]], name: str
) -> str:
    """One line for a LoRA of no known architecture: what was seen, beside the nearest that we know."""
    known = ", ".join(arch.title for arch in ARCHITECTURES.values())
    named = [reading for reading in readings if reading.slots]
    if not named:
        key = next(iter(split))
        return f"{name}: a LoRA of another model (key {key!r}, shape {list(shapes[key])}). Known are: {known}."
    nearest = min(named, key=lambda reading: len(_misfits(reading, shapes)))
    path, reason = _misfits(nearest, shapes)[0]
    return f"{name}: has the names of {nearest.arch.title} but not its shapes: {path}: {reason}. Known are: {known}."
