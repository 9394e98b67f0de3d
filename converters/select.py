"""Parts of a LoRA, by block and by kind of layer: kept, dropped or scaled (block weights)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING

from .architectures import Architecture, Module
from .errors import UserError
from .lora import FactorSpec, Lora

if TYPE_CHECKING:
    from .lora import Pair

KINDS = {
    "attn": r"attn\.|attention\.",
    "mlp": r"(img|txt)_mlp\.|feed_forward\.",
    "mod": r"(img|txt)_mod\.|adaLN_modulation",
    "img": r"attn\.to_(?!add_out)|img_",
    "txt": r"attn\.(add_|to_add_out)|txt_",
    "qkv": r"attn\.(to|add)_[qkv]|attention\.to_[qkv]",
    "out": r"attn\.to_(add_)?out|attention\.to_out",
}
"""Preset -> pattern at the start of a kind's name: attention, feed-forward and modulation; the image's and the text's
stream of Qwen-Image; the projections into and out of attention."""

THIRDS = {"early": (0, 1), "middle": (1, 2), "late": (2, 3)}
"""Preset -> its start and end, in thirds of the main stack."""

REST = "rest"

Rule = tuple[Callable[[Module], bool] | None, float]


def select(lora: Lora, blocks: str | None = None, kinds: str | None = None) -> Lora:
    """The parts of ``lora`` that both lists name, multiplied by their weights.

    A list has entries ``NAME`` or ``NAME:WEIGHT``, separated by commas; later entries win. Blocks: ``7``, ``0-19``,
    ``early``, ``middle``, ``late``, or another stack's name (``noise_refiner``, ``noise_refiner.0``). Kinds: a preset
    (`KINDS`) or a kind's name, in which ``*`` stands for anything (``attn.to_q``, ``img_mlp.*``). What no entry names
    is dropped if any entry has no weight, and kept unchanged if all have one; ``rest:WEIGHT`` sets its weight.
    Factors keep their dtype if that loses no digit, else they become float32.

    Raises UserError where an entry names nothing of the architecture, or nothing is left.
    """
    weights = dict.fromkeys(lora.specs, 1.0)
    for text, rule_for in ((blocks, _block_rule), (kinds, _kind_rule)):
        if text is not None:
            weight_of = _parse(text, lora.arch, rule_for)
            weights = {path: weight * weight_of(lora.arch.modules[path]) for path, weight in weights.items()}
    kept = weighted(lora, weights)
    if not kept.specs:
        raise UserError("Nothing of the LoRA is left with these blocks and kinds.")
    return kept


def weighted(lora: Lora, weights: Mapping[str, float]) -> Lora:
    """``lora`` with the update of each module multiplied by its weight, by path; modules of weight 0 are dropped."""
    specs = {}
    for path, spec in lora.specs.items():
        if weights[path]:
            specs[path] = spec.times(weights[path])
    if all(weights[path] == 1 for path in specs):
        return replace(lora, specs=specs)
    return replace(lora, specs=specs, load=partial(_weighted, lora, weights, specs))


def _weighted(lora: Lora, weights: Mapping[str, float], specs: Mapping[str, FactorSpec], path: str) -> Pair:
    down, up = lora.cast(specs[path].dtype)[path]
    return down, up * weights[path]


def _parse(
    text: str, arch: Architecture, rule_for: Callable[[str, Architecture], Callable[[Module], bool]]
) -> Callable[[Module], float]:
    rules: list[Rule] = []
    rest = 1.0
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, colon, number = entry.rpartition(":")
        if not colon:
            name, number, rest = entry, "1", 0.0
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UserError(f"{entry!r}: {number!r} is not a weight. Write NAME or NAME:WEIGHT, such as 0-19:0.5.")
        rules.append((rule_for(name, arch) if name != REST else None, weight))
    if not rules:
        raise UserError(f"{text!r} names nothing.")
    rest = next((weight for rule, weight in reversed(rules) if rule is None), rest)
    named = [(rule, weight) for rule, weight in reversed(rules) if rule is not None]
    return lambda module: next((weight for rule, weight in named if rule(module)), rest)


def _block_rule(name: str, arch: Architecture) -> Callable[[Module], bool]:
    stacks = {stack.name: stack for stack in arch.stacks}
    stem, _, tail = name.rpartition(".")
    stack = stacks.get(name) or stacks.get(stem) or arch.stacks[0]
    first, last = 0, stack.depth - 1
    if name in THIRDS:
        start, end = (stack.depth * third // 3 for third in THIRDS[name])
        first, last = start, end - 1
    elif name not in stacks:
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", tail if stem in stacks else name)
        if not numbers:
            raise UserError(f"{name!r} is not a block of {arch.title}. There are: {_blocks(arch)}.")
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
    if not first <= last < stack.depth:
        raise UserError(f"{name!r} is not within the blocks of {arch.title}: {_blocks(arch)}.")
    blocks = range(first, last + 1)
    return lambda module: module.stack == stack.name and module.block in blocks


def _blocks(arch: Architecture) -> str:
    main, *others = arch.stacks
    names = [f"0-{main.depth - 1}", *THIRDS, *(f"{s.name} or {s.name}.0-{s.depth - 1}" for s in others)]
    return ", ".join(names)


def _kind_rule(name: str, arch: Architecture) -> Callable[[Module], bool]:
    all_kinds = dict.fromkeys(module.kind.name for module in arch.modules.values())
    preset = re.compile(KINDS[name]) if name in KINDS else None
    named = {kind for kind in all_kinds if (preset.match(kind) if preset else fnmatchcase(kind, name))}
    if not named:
        presets = [preset for preset, mark in KINDS.items() if any(re.match(mark, kind) for kind in all_kinds)]
        raise UserError(
            f"{name!r} is not a kind of layer of {arch.title}. There are: {', '.join([*presets, *all_kinds])}."
        )
    return lambda module: module.kind.name in named
