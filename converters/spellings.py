"""The names of an architecture's layers: ours, the first implementation's, and aliases; with dots or underscores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from .architectures import ARCHITECTURES, Architecture
from .key_formats import KeyFormat

Target = tuple[str, "tuple[int, int] | None"]
"""A module's path, and its rows if it is a part of a fused layer."""


@dataclass(frozen=True)
class Spelling:
    """What a name in a key means: one module, or several of a fused layer.

    ``dotted`` and ``native`` as in KeyFormat; None if the name is the same either way. ``exact``: a key format writes
    it; False for an alias, and where dots and underscores are mixed.
    """

    targets: tuple[Target, ...]
    dotted: bool | None
    native: bool | None
    exact: bool = True

    def suits(self, key_format: KeyFormat) -> bool:
        return self.exact and self.dotted in (None, key_format.dotted) and self.native in (None, key_format.native)


@dataclass(frozen=True)
class NativeLayer:
    """A layer of a model's first implementation: its name, and our modules whose rows it holds, in order."""

    name: str
    paths: tuple[str, ...]


@cache
def native_layers(arch_id: str) -> dict[str, NativeLayer]:
    """The layers of the first implementation that differ from ours, by the path of each of our modules in them."""
    arch = ARCHITECTURES[arch_id]
    layers = (NativeLayer(name, paths) for name, paths in arch.expanded(arch.native).items())
    return {path: layer for layer in layers for path in layer.paths}


@cache
def _spellings(arch_id: str) -> dict[str, Spelling]:
    """Every name of the architecture's modules, dotted or underscored: ours, native, or an alias."""
    arch, native = ARCHITECTURES[arch_id], native_layers(arch_id)
    named: dict[str, tuple[tuple[Target, ...], bool | None]]
    named = {path: (((path, None),), False if path in native else None) for path in arch.modules}
    for table, is_native in ((arch.aliases, None), (arch.native, True)):
        named |= {name: (_targets(arch, paths), is_native) for name, paths in arch.expanded(table).items()}
    aliases = arch.expanded(arch.aliases)
    spellings: dict[str, Spelling] = {}
    for name, (targets, is_native) in named.items():
        flat = name.replace(".", "_")
        exact = name not in aliases
        spellings[name] = Spelling(targets, None if flat == name else True, is_native, exact)
        spellings.setdefault(flat, Spelling(targets, False, is_native, exact))
    return spellings


def spelling_of(arch_id: str, name: str) -> Spelling | None:
    """The meaning of a name, also of one in which dots and underscores are mixed, as some converters leave it."""
    names = _spellings(arch_id)
    if spelling := names.get(name):
        return spelling
    spelling = names.get(name.replace(".", "_"))
    return spelling and replace(spelling, exact=False)


def layer_names(arch_id: str) -> dict[str, tuple[str, ...]]:
    """Every dotted name of a layer -> paths of the modules whose rows it holds: one, or those of a fused layer."""
    arch = ARCHITECTURES[arch_id]
    return {path: (path,) for path in arch.modules} | arch.expanded(arch.aliases) | arch.expanded(arch.native)


def _targets(arch: Architecture, paths: tuple[str, ...]) -> tuple[Target, ...]:
    """The modules of a layer with their rows, in order; a layer that is not fused has no rows to tell."""
    ends = list(accumulate(arch.modules[path].shape[0] for path in paths))
    rows = zip([0, *ends[:-1]], ends, strict=True)
    return tuple((path, span if len(paths) > 1 else None) for path, span in zip(paths, rows, strict=True))
