"""The meaning of a LoRA file's keys: which module of which architecture each names, and in which key format. Only names
and shapes are needed, neither torch nor the data."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from . import networks
from .architectures import ARCHITECTURES, Architecture
from .errors import UserError
from .key_formats import KEY_FORMATS, OTHER_MODELS, TEXT_ENCODER, UNSUPPORTED, VARIANTS
from .key_parts import KeyParts, split_key, stems, without_wrapper
from .spellings import NativeLayer, Spelling, native_layers, spelling_of
from .text_encoders import describe_text_encoder

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """The keys of one module's tensors in a file, and their key format.

    ``prefix`` and ``name``: what the keys have before their suffix, the module's name as the file spells it.
    ``native``: it is the name of the model's first implementation (None: it is the same in ours). ``rows``: (start,
    end) of the module's rows in the up factor, where the file has a fused layer.
    """

    down: str
    up: str
    alpha: str | None = None
    rows: tuple[int, int] | None = None
    key_format: str = "other"
    prefix: str = ""
    name: str = ""
    native: bool | None = None


@dataclass(frozen=True)
class Reading:
    """What the keys of a file say.

    ``slots``: by module path, in the architecture's order; ``key_formats``: name -> number of keys; ``foreign``: keys
    of no module of this architecture; ``text_encoder``: keys of a text encoder; ``halves``: paths of modules of which
    one factor is missing; ``stray_alphas``: keys of alphas whose module has no factors; ``doubled``: keys that are not
    read, because the file has their modules once more; ``collisions``: (path, key, key) of modules that two keys name
    with nothing to choose between them; ``networks``: by module path, those that are not plain LoRA (of a DoRA,
    ``slots`` has the LoRA that is in it); ``mixed``: (path, kinds in words) of modules that hold several kinds of
    network; ``biases``: keys of bias differences.
    """

    arch: Architecture
    slots: dict[str, Slot]
    key_formats: dict[str, int]
    foreign: tuple[str, ...] = ()
    text_encoder: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    stray_alphas: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()
    collisions: tuple[tuple[str, str, str], ...] = ()
    networks: Mapping[str, networks.Network] = field(default_factory=dict)
    mixed: tuple[tuple[str, str], ...] = ()
    biases: tuple[str, ...] = ()

    @property
    def modules(self) -> list[str]:
        """The paths of all modules that the file changes, in the architecture's order."""
        return [path for path in self.arch.modules if path in self.slots or path in self.networks]

    @property
    def key_format(self) -> str:
        """The name of the key format: "mixed" if there are several, "other" if it has no name."""
        return next(iter(self.key_formats)) if len(self.key_formats) == 1 else "mixed"


@dataclass(frozen=True)
class Layer:
    """A layer as a file holds it, also where a factor is missing: one prefix, name and suffix.

    ``suffix``: of the down factor, also where only the up factor is there; empty where only an alpha is. ``keys``: by
    part, "down", "up" and "alpha". ``spelling``: what the name means.
    """

    prefix: str
    name: str
    suffix: str
    keys: Mapping[str, str]
    spelling: Spelling


_UNSUPPORTED = re.compile("|".join(UNSUPPORTED), re.MULTILINE)


def module_path(name: str, arch: Architecture, *, fused: bool = False) -> str | None:
    """The path of the module that a program calls ``name``: with dots or underscores, with any known prefix.

    ``fused``: the path in `Architecture.fused`. None where there is no such module there, such as a fused layer among
    ours, or a part of one among those of the first implementation.
    """
    for _, stem in stems(without_wrapper(name)):
        if spelling := spelling_of(arch.id, stem):
            paths = tuple(path for path, _ in spelling.targets)
            layer = native_layers(arch.id).get(paths[0], NativeLayer(paths[0], paths[:1]))
            named = {layer.paths: layer.name} if fused else {paths[:1]: paths[0]}
            if paths in named:
                return named[paths]
    return None


def layers_of(arch: Architecture, names: Iterable[str]) -> list[Layer]:
    """The layers of a file by its keys, in their order, each as often as it is there: what a program sees that asks
    for keys, not for modules."""
    layers: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    spellings: dict[str, Spelling] = {}
    for name in names:
        ways = ((way, spelling) for way in split_key(name) if (spelling := spelling_of(arch.id, way.stem)))
        way, spelling = next(ways, (None, None))
        if way is None or spelling is None or way.part not in ("down", "up", "alpha"):
            continue
        spellings[way.stem] = spelling
        layers[way.prefix, way.stem][way.form][way.part] = name
    found = []
    for (prefix, stem), by_suffix in layers.items():
        alpha = by_suffix.pop("", {})
        for suffix, keys in (by_suffix or {"": {}}).items():
            found.append(Layer(prefix, stem, suffix, {**keys, **alpha}, spellings[stem]))
    return found


def _possible_key_formats(key: KeyParts, spelling: Spelling) -> list[str]:
    """The key formats in which a key may be: several where a name is the same in them. Other networks' suffixes are the
    same in all key formats, also beside factors of a pair of suffixes that has no name."""
    named = [
        key_format.name
        for key_format in (*KEY_FORMATS.values(), *VARIANTS)
        if key.prefix == key_format.prefix
        and (key.suffix in (key_format.down, key_format.up) or key.part not in ("down", "up"))
        and spelling.suits(key_format)
    ]
    return named if named and key.part in ("down", "up") else [*named, "other"]


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

    Raises UserError where it is not a LoRA, or one of an unsupported kind or an unknown model.
    """
    if _UNSUPPORTED.search("\n".join(shapes)):  # one search, as a file has thousands of keys
        key = next(filter(_UNSUPPORTED.search, shapes))
        kind = next(kind for mark, kind in UNSUPPORTED.items() if re.search(mark, key, re.MULTILINE))
        raise UserError(f"{name}: holds {kind}, which is not supported (key {key!r}). Only plain LoRA is.")
    split = {key: split_key(key) for key in shapes}
    first = next((key for key, ways in split.items() if ways), None)
    if first is None:
        first = next(iter(shapes), None)
        raise UserError(f"{name}: not a LoRA: " + (f"no LoRA keys (first key {first!r})." if first else "it is empty."))
    readings, fitting = list[Reading](), list[Reading]()
    for arch in ARCHITECTURES.values():
        reading = _parse_as(arch, split)
        if reading.modules or reading.halves or reading.mixed:
            readings.append(reading)
            if not _misfits(reading, shapes) and not _other_model(reading):
                fitting.append(reading)
                if not reading.foreign:  # no other can explain more; a full file takes 30 ms for each
                    break
    if not fitting:
        only_text = describe_text_encoder(key for key, ways in split.items() if ways)
        raise UserError(_unknown_model(readings, shapes, only_text, first, name))
    return max(fitting, key=lambda reading: len(reading.modules))


class _Found(NamedTuple):
    """A key of a module: how it is split, and what its name means."""

    key: KeyParts
    spelling: Spelling
    rows: tuple[int, int] | None


def _parse_as(arch: Architecture, split: Mapping[str, list[KeyParts]]) -> Reading:
    found: dict[str, list[_Found]] = defaultdict(list)
    foreign, text_encoder, biases = list[str](), list[str](), list[str]()
    for key, ways in split.items():
        named = ((way, spelling) for way in ways if (spelling := spelling_of(arch.id, way.stem)))
        taken, spelling = next(named, (None, None))
        if taken is None or spelling is None:
            (text_encoder if key.startswith(TEXT_ENCODER) else foreign).append(key)
            continue
        if taken.part == "bias":
            biases.append(key)
            continue
        for path, rows in spelling.targets:
            found[path].append(_Found(taken, spelling, rows))

    chosen: dict[str, dict[str, _Found]] = {}
    collisions, stray = list[tuple[str, str, str]](), list[str]()
    for path in (path for path in arch.modules if path in found):
        parts, twice = _one_of_each(found[path])
        if twice:
            collisions.append((path, *twice))
        if parts.keys() == {"alpha"}:
            stray.append(parts["alpha"].key.key)
        else:
            chosen[path] = parts
    key_formats = _key_formats_of([one for parts in chosen.values() for part, one in parts.items() if part != "alpha"])
    slots, others, halves, mixed = {}, {}, [], []
    for path, parts in chosen.items():
        kind, kinds = _network_of(parts), networks.kinds_of(parts)
        if len(kinds) > 1:
            mixed.append((path, " and ".join(kinds)))
        elif kind is None:
            halves.append(path)
        if kind is None:
            continue
        if kind == "LoRA":
            up, alpha = parts["up"], parts.get("alpha")
            slots[path] = Slot(
                parts["down"].key.key, up.key.key, alpha.key.key if alpha else None, up.rows,
                key_formats[up.key.key], up.key.prefix, up.key.stem, up.spelling.native,
            )  # fmt: skip
        if kind != "LoRA" or "magnitude" in parts:
            one = next(one for one in parts.values() if one.key.part != "alpha")
            keys = {part: one.key.key for part, one in parts.items()}
            others[path] = networks.Network(kind, keys, one.rows, one.key.stem)
    used = {one.key.key for parts in chosen.values() for one in parts.values()} | {*stray}
    doubled = dict.fromkeys(one.key.key for ones in found.values() for one in ones if one.key.key not in used)
    counts = dict(Counter(key_formats.values()).most_common())
    return Reading(
        arch, slots, counts, tuple(foreign), tuple(text_encoder), tuple(halves), tuple(dict.fromkeys(stray)),
        tuple(doubled), tuple(collisions), others, tuple(mixed), tuple(biases),
    )  # fmt: skip


def _network_of(parts: Iterable[str]) -> str | None:
    """The kind of network that a module's parts make, or None: they are not all there, or of several kinds."""
    kinds = networks.kinds_of(parts := list(parts))
    return kinds[0] if len(kinds) == 1 and networks.is_complete(kinds[0], parts) else None


def _one_of_each(ones: list[_Found]) -> tuple[dict[str, _Found], tuple[str, str] | None]:
    """A module's keys by part; and two keys between which there is nothing to choose, if there are.

    A module that stands in a fused layer and also under its own name is taken from the latter, as diffusers does.
    """
    parts = [one.key.part for one in ones]
    if len({*parts}) < len(parts) or len(networks.kinds_of(parts)) > 1:
        for native in (False, True):
            whole = [one for one in ones if (bool(one.spelling.native) or one.rows is not None) == native]
            if _network_of(one.key.part for one in whole):
                ones = whole
                break
    first: dict[str, _Found] = {}
    twice = None
    for one in ones:
        if one.key.part not in first:
            first[one.key.part] = one
        else:
            twice = twice or (first[one.key.part].key.key, one.key.key)
    if twice:  # those that belong to the first factor are described
        lead = next(one.key for one in ones if one.key.part != "alpha")
        kin = [one for one in ones if (one.key.prefix, one.key.stem) == (lead.prefix, lead.stem)]
        first |= {one.key.part: one for one in reversed(kin) if one.key.form in ("", lead.form)}
    return first, twice


def _key_formats_of(ones: Iterable[_Found]) -> dict[str, str]:
    """Key -> key format. A name that several key formats share counts for the one that explains the whole file."""
    alike: dict[tuple[object, ...], list[str]] = {}  # the same for thousands of keys
    possible: dict[str, list[str]] = {}
    for key, spelling, _ in ones:
        mark = (key.prefix, key.suffix, key.part, spelling.dotted, spelling.native, spelling.exact)
        if mark not in alike:
            alike[mark] = _possible_key_formats(key, spelling)
        possible[key.key] = alike[mark]
    options = iter(possible.values())
    common = [name for name in next(options, ()) if all(name in others for others in possible.values())]
    return {key: (common or names)[0] for key, names in possible.items()}


def _other_model(reading: Reading) -> str | None:
    """Why a file is of another model although its names and shapes fit, or None."""
    arch = reading.arch
    marks = {
        mark: title for mark, title in OTHER_MODELS.items() if not any(re.search(mark, name) for name in arch.depths)
    }
    depths = {name.replace(".", "_"): depth for name, depth in arch.depths.items()}
    in_block = re.compile(rf"(?:^|_)({'|'.join(depths)})_(\d+)_")
    for key in reading.foreign:
        for mark, title in marks.items():
            if re.search(mark, key):
                return f"{key!r} belongs to {title}"
        block = in_block.search(key.replace(".", "_"))
        if block and int(block[2]) >= depths[block[1]]:
            return f"{key!r} is beyond the {depths[block[1]]} blocks of {arch.title}"
    return None


def _misfits(reading: Reading, shapes: Mapping[str, Shape]) -> list[tuple[str, str]]:
    width: dict[str, int] = defaultdict(int)
    for slot in reading.slots.values():
        if slot.rows:
            width[slot.up] = width[slot.up] or _fused_rows(slot.name, reading)
    reasons = [(path, _misfit(slot, path, reading.arch, shapes, width)) for path, slot in reading.slots.items()]
    for path, network in reading.networks.items():
        d_out, d_in = reading.arch.modules[path].shape
        d_out = _fused_rows(network.name, reading) if network.rows else d_out
        reasons.append((path, networks.misfit(network, shapes, d_out, d_in)))
    return [(path, reason) for path, reason in reasons if reason]


def _fused_rows(name: str, reading: Reading) -> int:
    """The rows of a fused layer: those of all modules in it."""
    spelling = spelling_of(reading.arch.id, name)
    return sum(reading.arch.modules[path].shape[0] for path, _ in spelling.targets) if spelling else 0


def _unknown_model(
    readings: Iterable[Reading], shapes: Mapping[str, Shape], only_text: str | None, first: str, name: str
) -> str:
    """The error for a LoRA of no known architecture: its ``first`` key, or how it differs from the nearest one."""
    known = ", ".join(arch.title for arch in ARCHITECTURES.values())
    named = [reading for reading in readings if reading.modules]
    if not named and only_text:
        return (
            f"{name}: a LoRA of a text encoder only ({only_text}, key {first!r}): it has nothing for a model, and "
            f"nothing can be made of it here. Known: {known}."
        )
    if not named:
        return f"{name}: a LoRA of another model (key {first!r}, shape {list(shapes[first])}). Known: {known}."
    # The nearest is the one of which the most modules fit, then of which the most are named; the first of equals.

    def fit(reading: Reading) -> tuple[int, int]:
        count = len(reading.slots) + len(reading.networks)
        return count - len(_misfits(reading, shapes)), count

    nearest = max(named, key=fit)
    if other := _other_model(nearest):
        return f"{name}: a LoRA of another model ({other}). Known: {known}."
    path, reason = _misfits(nearest, shapes)[0]
    return f"{name}: has the names of {nearest.arch.title} but not its shapes: {path}: {reason}. Known: {known}."
