"""The meaning of a LoRA file's keys: which module of which architecture each names, and in which dialect.

Only names and shapes are needed, neither torch nor the data.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from . import networks
from .architectures import ARCHITECTURES, Architecture
from .dialects import DIALECTS, OTHER_MODELS, PREFIXES, SUFFIXES, TEXT_ENCODER, UNSUPPORTED, VARIANTS, Dialect
from .errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """The keys of one module's tensors in a file, and their dialect. ``rows``: (start, end) of the module's rows in the
    up factor, where the file has a fused layer."""

    down: str
    up: str
    alpha: str | None = None
    rows: tuple[int, int] | None = None
    dialect: str = "other"


@dataclass(frozen=True)
class Reading:
    """What the keys of a file say.

    ``slots``: by module path, in the architecture's order; ``dialects``: name -> number of keys; ``foreign``: keys of
    no module of this architecture; ``text_encoder``: keys of a text encoder; ``halves``: paths of modules of which one
    factor is missing; ``networks``: by module path, those that are not plain LoRA (of a DoRA, ``slots`` has the LoRA
    that is in it); ``biases``: keys of bias differences.
    """

    arch: Architecture
    slots: dict[str, Slot]
    dialects: dict[str, int]
    foreign: tuple[str, ...] = ()
    text_encoder: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    networks: Mapping[str, networks.Network] = field(default_factory=dict)
    biases: tuple[str, ...] = ()

    @property
    def modules(self) -> list[str]:
        """The paths of all modules that the file changes, in the architecture's order."""
        return [path for path in self.arch.modules if path in self.slots or path in self.networks]

    @property
    def dialect(self) -> str:
        """The name of the dialect: "mixed" if there are several, "other" if it has no name."""
        return next(iter(self.dialects)) if len(self.dialects) == 1 else "mixed"


class _Key(NamedTuple):
    """A key, split. A tuple, because a file has thousands."""

    key: str
    prefix: str
    stem: str
    suffix: str

    @property
    def part(self) -> str:
        return PARTS[self.suffix]


PARTS = SUFFIXES | networks.SUFFIXES
"""What may follow the module's name -> which of its tensors that is, of any network."""

_SUFFIX = re.compile(rf"(?:{'|'.join(map(re.escape, PARTS))})\Z")


def _split(key: str) -> list[_Key]:
    """Every way to split a key, the longest prefix first; empty if it is not a LoRA key.

    The suffix is the longest that fits: the first match from the left.
    """
    suffix = _SUFFIX.search(key)
    if suffix is None:
        return []
    stem = key[: suffix.start()]
    return [_Key(key, prefix, stem[len(prefix) :], suffix[0]) for prefix in PREFIXES if stem.startswith(prefix)]


Target = tuple[str, "tuple[int, int] | None"]
"""A module's path, and its rows if it is a part of a fused layer."""


@dataclass(frozen=True)
class _Spelling:
    """What a name in a key means: one module, or several of a fused layer.

    ``dotted`` and ``native`` as in Dialect; None if the name is the same either way.
    """

    targets: tuple[Target, ...]
    dotted: bool | None
    native: bool | None

    def suits(self, dialect: Dialect) -> bool:
        return self.dotted in (None, dialect.dotted) and self.native in (None, dialect.native)


@dataclass(frozen=True)
class NativeLayer:
    """A layer of a model's first implementation: its name, and our modules whose rows it holds, in order."""

    name: str
    paths: tuple[str, ...]


@cache
def native_layers(arch_id: str) -> dict[str, NativeLayer]:
    """The layers of the first implementation that differ from ours, by the path of each of our modules in them."""
    arch = ARCHITECTURES[arch_id]
    layers: dict[str, NativeLayer] = {}
    for path in arch.modules:
        for other, ours in (arch.renamed or {}).items():
            if path == ours or path.endswith("." + ours):
                layers[path] = NativeLayer(path.removesuffix(ours) + other, (path,))
        for fused, kinds in (arch.fused or {}).items():
            if path.endswith("." + kinds[0]):
                stem = path.removesuffix(kinds[0])
                layer = NativeLayer(stem + fused, tuple(stem + kind for kind in kinds))
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


def module_path(name: str, arch: Architecture) -> str | None:
    """The path of the module that a program calls ``name``: with dots or underscores, with any known prefix.

    None where there is no such module, or where the name is a fused layer's.
    """
    names = _spellings(arch.id)
    for prefix in PREFIXES:
        spelling = names.get(name[len(prefix) :]) if name.startswith(prefix) else None
        if spelling and len(spelling.targets) == 1:
            return spelling.targets[0][0]
    return None


def _possible_dialects(key: _Key, spelling: _Spelling) -> list[str]:
    """The dialects in which a key may be: several where a name is the same in them. Other networks' suffixes are the
    same in all dialects."""
    return [
        dialect.name
        for dialect in (*DIALECTS.values(), *VARIANTS)
        if key.prefix == dialect.prefix
        and (key.suffix in (dialect.down, dialect.up) or key.suffix in networks.SUFFIXES)
        and spelling.suits(dialect)
    ] or ["other"]


def _misfit(
    slot: Slot, path: str, arch: Architecture, shapes: Mapping[str, Shape], width: Mapping[str, int]
) -> str | None:
    """Why the factors do not fit the module, or None. ``width``: rows of an up factor that holds a fused layer."""
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


def parse_keys(shapes: Mapping[str, Shape], name: str) -> Reading:
    """The meaning of a LoRA file's keys, given {key: shape}. ``name``: the file's, for messages.

    Raises UserError where it is not a LoRA, or one of an unsupported kind or an unknown model, or where two keys name
    the same module.
    """
    unsupported = re.compile("|".join(UNSUPPORTED))
    for key in shapes:
        if unsupported.search(key):
            kind = next(kind for mark, kind in UNSUPPORTED.items() if re.search(mark, key))
            raise UserError(f"{name}: holds {kind}, which is not supported (key {key!r}). Only plain LoRA is.")
    split = {key: _split(key) for key in shapes}
    if not any(split.values()):
        first = next(iter(shapes), None)
        raise UserError(f"{name}: not a LoRA: " + (f"no LoRA keys (first key {first!r})." if first else "it is empty."))
    candidates = [_parse_as(arch, split, name) for arch in ARCHITECTURES.values()]
    readings = [reading for reading in candidates if reading.modules or reading.halves]
    fitting = [r for r in readings if not _misfits(r, shapes) and not _other_model(r)]
    if not fitting:
        raise UserError(_unknown_model(readings, shapes, next(key for key, ways in split.items() if ways), name))
    return max(fitting, key=lambda reading: len(reading.modules))


def _parse_as(arch: Architecture, split: Mapping[str, list[_Key]], name: str) -> Reading:
    names = _spellings(arch.id)
    found: dict[str, dict[str, _Key]] = defaultdict(dict)
    rows: dict[str, tuple[int, int] | None] = {}
    dialects_of: dict[str, list[str]] = {}
    foreign, text_encoder, biases = list[str](), list[str](), list[str]()
    for key, ways in split.items():
        taken = next((way for way in ways if way.stem in names), None)
        if taken is None:
            (text_encoder if key.startswith(TEXT_ENCODER) else foreign).append(key)
            continue
        if taken.part == "bias":
            biases.append(key)
            continue
        spelling = names[taken.stem]
        if taken.part != "alpha":
            dialects_of[key] = _possible_dialects(taken, spelling)
        for path, slice_ in spelling.targets:
            if taken.part in found[path]:
                first = found[path][taken.part].key
                raise UserError(f"{name}: two keys name the module {path}: {first!r} and {key!r}.")
            found[path][taken.part] = taken
            rows[path] = slice_
    # A name that several dialects share counts for the one that explains the whole file.
    common = [
        dialect for dialect in next(iter(dialects_of.values()), ()) if all(dialect in o for o in dialects_of.values())
    ]
    dialect_of = {key: (common or options)[0] for key, options in dialects_of.items()}
    slots, others, halves = {}, {}, []
    for path in (path for path in arch.modules if path in found):
        parts = {part: key.key for part, key in found[path].items()}
        kinds = networks.kinds_of(parts)
        if len(kinds) > 1:
            raise UserError(f"{name}: the module {path} holds {' and '.join(kinds)}, and one network a module is read.")
        if not kinds or not networks.is_complete(kinds[0], parts):
            halves.append(path)
            continue
        if kinds == ["LoRA"]:
            slots[path] = Slot(parts["down"], parts["up"], parts.get("alpha"), rows[path], dialect_of[parts["up"]])
        if kinds != ["LoRA"] or "magnitude" in parts:
            others[path] = networks.Network(kinds[0], parts, rows[path])
    counts = dict(Counter(dialect_of.values()).most_common())
    told = (tuple(foreign), tuple(text_encoder), tuple(halves))
    return Reading(arch, slots, counts, *told, networks=others, biases=tuple(biases))


def _other_model(reading: Reading) -> str | None:
    """Why a file is of another model although its names and shapes fit, or None."""
    for key in reading.foreign:
        for mark, title in OTHER_MODELS.items():
            if re.search(mark, key):
                return f"{key!r} belongs to {title}"
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
    reasons = [(path, _misfit(slot, path, reading.arch, shapes, width)) for path, slot in reading.slots.items()]
    for path, network in reading.networks.items():
        d_out, d_in = reading.arch.modules[path].shape
        if network.rows:
            d_out = sum(reading.arch.modules[part].shape[0] for part in native_layers(reading.arch.id)[path].paths)
        reasons.append((path, networks.misfit(network, shapes, d_out, d_in)))
    return [(path, reason) for path, reason in reasons if reason]


def _unknown_model(readings: Iterable[Reading], shapes: Mapping[str, Shape], first: str, name: str) -> str:
    """The error for a LoRA of no known architecture: its ``first`` key, or how it differs from the nearest one."""
    known = ", ".join(arch.title for arch in ARCHITECTURES.values())
    named = [reading for reading in readings if reading.modules]
    other = next((reason for reading in named if (reason := _other_model(reading))), None)
    if other or not named:
        other = other or f"key {first!r}, shape {list(shapes[first])}"
        return f"{name}: a LoRA of another model ({other}). Known: {known}."
    nearest = min(named, key=lambda reading: len(_misfits(reading, shapes)))
    path, reason = _misfits(nearest, shapes)[0]
    return f"{name}: has the names of {nearest.arch.title} but not its shapes: {path}: {reason}. Known: {known}."
