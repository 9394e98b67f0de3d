"""The scale of each module's update: alpha / rank, wherever a file says its alpha.

sd-scripts and its kin write a tensor for each module. diffusers writes the configuration of PEFT into the header, PEFT
writes it into a file of its own beside the factors. What they say comes from anybody: sizes, types, and the time that
a pattern can take, are bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files, keys, networks
from .errors import UserError
from .headers import parse_json, read_json

ADAPTER_METADATA = "lora_adapter_metadata"
"""Key of the header under which diffusers writes PEFT's configuration, as JSON."""
ADAPTER_CONFIG = "adapter_config.json"
"""File in which PEFT writes its configuration."""
ADAPTER_FILE = "adapter_model.safetensors"
FOLDER_FILES = (ADAPTER_FILE, "pytorch_lora_weights.safetensors")
"""The LoRA in a folder that PEFT or diffusers has written."""

TENSORS, HEADER, BESIDE, ASKED, NOWHERE = (
    "alpha tensors", f"header ({ADAPTER_METADATA})", ADAPTER_CONFIG, "--alpha", "nowhere, so 1"
)  # fmt: skip
"""Where a scale can come from, in words for the user."""

PATTERN_LENGTH = 300
PATTERN_LIMIT = 16
"""Regular expressions in a configuration. Plain names are not counted: there may be one for each module."""


@dataclass(frozen=True)
class Scales:
    """What a file says of its scales, by module path: ``values``, and ``sources``, one of the words above.

    ``problems``: why values are not to be relied on, a line each; then they are 1, 0 or not finite.
    """

    values: Mapping[str, float]
    sources: Mapping[str, str]
    problems: tuple[str, ...] = ()


def lora_file(path: Path | str) -> Path:
    """The LoRA file that a path names: itself, or the one in a folder of PEFT's or diffusers'.

    Raises UserError for a folder that has none, or several.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    here = [path / name for name in FOLDER_FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if not here or (len(here) > 1 and here[0].name not in FOLDER_FILES):
        found = f"{len(here)} .safetensors files" if here else "no .safetensors file"
        raise UserError(f"{path.name}: a folder that cannot be taken for a LoRA: it holds {found}. Name a file.")
    return here[0]


def read_scales(file: files.TensorFile, reading: keys.Reading, alpha: float | None = None) -> Scales:
    """The scales of an open file. ``alpha`` is what the user says of a file that says nothing, or nothing true.

    Raises UserError where ``alpha`` is given and the file has its own, and where an alpha is no number.
    """
    problems: list[str] = []
    config, place = None, NOWHERE
    try:
        config, place = adapter_config(file)
    except ValueError as error:
        problems.append(f"its {error}: the scale is unknown; say it with --alpha")
    values, sources = dict[str, float](), dict[str, str]()
    stale: list[str] = []
    for path in reading.modules:
        slot, network = reading.slots.get(path), reading.networks.get(path)
        key = slot.alpha if slot else network and network.keys.get("alpha")
        values[path], sources[path] = 1.0, TENSORS if key else place
        if key:
            values[path] = _scale_of_alpha(file, reading, path, file.number(key))
        elif config and (network.kind if network else "LoRA") != config.network:
            title = network.title if network else "LoRA"
            stale.append(f"{path} is {title}, not {config.network} as its {place} says")
        elif config:
            rank = file.info(slot.down).shape[0] if slot else _rank_of(file, network)
            name = _name_of(path, slot, network)
            ranks = config.rank_pattern.values(name, config.r)
            if rank in (None, *ranks):
                values[path] = config.scale(name, rank or int(ranks[0]))
            else:
                stale.append(f"{path} has rank {rank}, not {ranks[0]:g} as its {place} says")
    if stale:
        problems.append(f"{stale[0]}: the scale is unknown; say it with --alpha (the rank, if it is 1)")
    problems += _harmful(file, reading, values)
    if alpha is not None:
        told = {path for path, place in sources.items() if place == TENSORS or (place != NOWHERE and not problems)}
        if len(told) == len(values):
            raise UserError(f"{file.path.name}: says its scale itself ({sources[min(told)]}). Leave --alpha out.")
        for path in values.keys() - told:
            values[path], sources[path] = _scale_of_alpha(file, reading, path, alpha), ASKED
        problems = _harmful(file, reading, values)
    return Scales(values, sources, tuple(problems))


def _name_of(path: str, slot: keys.Slot | None, network: networks.Network | None) -> str:
    """The name by which PEFT knows a module: ours, but for a fused layer of a model's first implementation."""
    if slot:
        return slot.name if slot.native and slot.rows else path
    return network.name if network and network.rows else path


def _rank_of(file: files.TensorFile, network: networks.Network | None) -> int | None:
    """The rank of another network's factors; None where it has none, so that only its configuration tells it."""
    return networks.rank_of_factors(network.kind, network.shapes(file.header.shapes)) if network else None


def _harmful(file: files.TensorFile, reading: keys.Reading, values: Mapping[str, float]) -> list[str]:
    """What to say of the first scale that is 0 or not finite."""
    for path, scale in values.items():
        if not scale or not math.isfinite(scale):
            alpha = scale / _scale_of_alpha(file, reading, path, 1.0)
            slot, network = reading.slots.get(path), reading.networks.get(path)
            key = slot.alpha if slot else network and network.keys.get("alpha")
            return [f"{key or f'the alpha of {path}'} is {alpha:g}: the LoRA would do nothing or harm"]
    return []


def _scale_of_alpha(file: files.TensorFile, reading: keys.Reading, path: str, alpha: float) -> float:
    """What an alpha means for a module. One of 0, or not finite, is never meant: it stays what it is."""
    slot = reading.slots.get(path)
    if slot:
        return alpha / file.info(slot.down).shape[0]
    network = reading.networks[path]
    usable = alpha and math.isfinite(alpha)
    return networks.scale(network.kind, network.shapes(file.header.shapes), alpha) if usable else alpha


@dataclass(frozen=True)
class AdapterConfig:
    """What PEFT's configuration says of ranks and alphas: one for all modules, and others by pattern. ``network``: the
    kind that it describes, as `networks.Network` calls it."""

    network: str
    r: int
    lora_alpha: float
    rank_pattern: NamePatterns
    alpha_pattern: NamePatterns
    use_rslora: bool

    def scale(self, name: str, rank: int) -> float:
        """Of the update of the module that PEFT calls ``name``."""
        return self.alpha_pattern.values(name, self.lora_alpha)[0] / (math.sqrt(rank) if self.use_rslora else rank)


class NamePatterns:
    """Numbers by pattern of a module's name, as PEFT matches them: the first that is the name's end, from a dot on.

    Names are looked up, so that thousands cost nothing. Raises ValueError for what is no such table, and for a regular
    expression that could take long.
    """

    def __init__(self, raw: object, what: str) -> None:
        if not isinstance(raw, Mapping):
            raise ValueError(f"{what} is no table")
        self._names: dict[str, tuple[int, float]] = {}
        self._patterns: list[tuple[int, re.Pattern[str], float]] = []
        for order, (pattern, value) in enumerate(raw.items()):
            number = _number(value, what)
            name = pattern.replace("\\.", ".").removesuffix("$")
            if re.fullmatch(r"\^?[\w.-]+", name):
                self._names.setdefault(name, (order, number))
            else:
                self._patterns.append((order, _safe(pattern, what), number))
        if len(self._patterns) > PATTERN_LIMIT:
            raise ValueError(f"{what} has {len(self._patterns)} patterns; more than {PATTERN_LIMIT} are not read")

    def values(self, name: str, default: float) -> list[float]:
        """The numbers of all patterns that match, in order, else ``default``. PEFT takes the first; but diffusers and
        PEFT sort the patterns when they write them, so that for ranks, which can be seen, any may be the right one."""
        ends = [name, *(name[dot.end() :] for dot in re.finditer(r"\.", name)), "^" + name]
        hits = [self._names[end] for end in ends if end in self._names]
        hits += [(order, number) for order, pattern, number in self._patterns if pattern.match(name)]
        return [number for _, number in sorted(hits)] or [default]


def _safe(pattern: str, what: str) -> re.Pattern[str]:
    """The pattern, compiled. Its time is bounded: at most two repeats, none of a group."""
    shape = pattern.replace("(?:", "(")
    repeats = len(re.findall(r"[*+?]", shape))
    if len(pattern) > PATTERN_LENGTH or repeats > 2 or re.search(r"\)[*+?]|\(\?|\{|\\\d", shape):
        raise ValueError(f"{what} has a pattern that is not read ({pattern[:60]!r})")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError):
        raise ValueError(f"{what} has no proper pattern ({pattern[:60]!r})") from None


def _number(value: object, what: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"{what} is no number ({str(value)[:40]!r})")
    return value  # type: ignore[return-value]


def adapter_config(file: files.TensorFile, component: str = "transformer") -> tuple[AdapterConfig | None, str]:
    """PEFT's configuration of a file, and where it stands: in the header, or beside the file. None where nowhere.

    ``component``: of the pipeline, of which a header may describe several. Raises ValueError with a short reason.
    """
    beside = file.path.with_name(ADAPTER_CONFIG)
    if text := file.header.metadata.get(ADAPTER_METADATA):
        place, read = HEADER, lambda: parse_json(text.encode())
    elif file.path.name == ADAPTER_FILE and beside.is_file():
        place, read = BESIDE, lambda: read_json(beside)
    else:
        return None, NOWHERE
    try:
        raw = read()
        own = {key.removeprefix(component + "."): raw[key] for key in raw if key.startswith(component + ".")}
        return _config(own or raw), place
    except OSError as error:
        raise ValueError(f"{place} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{place} is not usable ({error})".replace("its header", "it")) from None


LYCORIS_TYPES = {"LOKR": "LoKr", "LOHA": "LoHa"}
"""PEFT's name of a network whose alpha is called ``alpha`` -> ours."""


def _config(raw: Mapping[str, Any]) -> AdapterConfig | None:
    """None where it says nothing of scales. What it leaves out is as in PEFT's own defaults."""
    network = LYCORIS_TYPES.get(str(raw.get("peft_type")), "LoRA")
    alpha = "lora_alpha" if network == "LoRA" else "alpha"
    if not {"r", alpha} & raw.keys():
        return None
    rank, rslora = _number(raw.get("r", 8), "r"), raw.get("use_rslora") or False
    ranks, alphas = (NamePatterns(raw.get(name) or {}, name) for name in ("rank_pattern", "alpha_pattern"))
    if type(rank) is not int or rank < 1 or not isinstance(rslora, bool):
        raise ValueError("r or use_rslora is of the wrong kind")
    return AdapterConfig(network, rank, _number(raw.get(alpha, 8), alpha), ranks, alphas, rslora)
