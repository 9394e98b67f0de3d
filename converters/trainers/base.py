"""What every trainer's file fills in: which modules it trains, in which dialect it starts, and how it is started."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..architectures import Architecture


@dataclass(frozen=True)
class Start:
    """One start of a training run: the names that a trainer's texts are made of.

    ``init`` is the absolute path of the init file, ``name`` a run name that no earlier run has had; ``paths`` are the
    modules in the init file.
    """

    arch: Architecture
    init: Path
    name: str
    rank: int
    seed: int
    paths: tuple[str, ...]

    @property
    def kinds(self) -> list[str]:
        """The kinds of layers in the init file, in the order of the model."""
        return list(dict.fromkeys(self.arch.modules[path].kind.name for path in self.paths))


@dataclass(frozen=True)
class Model:
    """How a trainer takes one family of models.

    ``trains``: the modules it trains when told nothing, as a pattern of the whole path; ``can``: those it trains when
    told to. ``files``: the texts that start it, by file name, given a Start.
    """

    trains: str
    can: str
    files: Callable[[Start], Mapping[str, str]]


@dataclass(frozen=True)
class Trainer:
    """A trainer: the dialect of its init file and, by family, how it takes a model. ``run``: the file to start with.
    ``notes``: what a person has to know, a line each."""

    id: str
    title: str
    dialect: str
    models: Mapping[str, Model]
    run: str
    notes: tuple[str, ...] = ()


def matching(arch: Architecture, pattern: str) -> list[str]:
    """The modules whose whole path a pattern matches, in the order of the model."""
    return [path for path in arch.modules if re.fullmatch(pattern, path)]


def lacking(start: Start, model: Model) -> list[str]:
    """The kinds that the trainer would train by itself and of which the init file has nothing."""
    kinds = dict.fromkeys(start.arch.modules[path].kind.name for path in matching(start.arch, model.trains))
    return [kind for kind in kinds if kind not in start.kinds]


def short(kinds: Iterable[str]) -> list[str]:
    """Kinds by the end of their names that tells them apart for PEFT: ``to_q``, ``img_mlp.net.2``, ``w1``."""
    return [re.sub(r"^(attn|attention|feed_forward)\.", "", kind) for kind in kinds]
