"""What every trainer's file describes: which modules it trains, which dialect it reads, and how it is started."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..architectures import Architecture


@dataclass(frozen=True)
class TrainingStart:
    """The start of a training run: what a trainer's texts are made of.

    ``init``: absolute path of the LoRA to start from; ``name``: a run name that no earlier run has had; ``paths``: the
    modules in that LoRA.
    """

    arch: Architecture
    init: Path
    name: str
    rank: int
    seed: int
    paths: tuple[str, ...]

    @property
    def kinds(self) -> list[str]:
        """The kinds of layers in the LoRA, in the order of the model."""
        return list(dict.fromkeys(self.arch.modules[path].kind.name for path in self.paths))


@dataclass(frozen=True)
class ModelSupport:
    """How a trainer trains one family of models.

    ``default``: the modules that it trains by default, as a pattern of the whole path; ``trainable``: those that it can
    train. ``files``: makes the texts that start it, {file name: text}.
    """

    default: str
    trainable: str
    files: Callable[[TrainingStart], Mapping[str, str]]


@dataclass(frozen=True)
class Trainer:
    """A trainer. ``dialect``: that it reads; ``models``: by model family; ``run``: name of the script or configuration
    among its files; ``notes``: lines for the read-me."""

    id: str
    title: str
    dialect: str
    models: Mapping[str, ModelSupport]
    run: str
    notes: tuple[str, ...] = ()


def modules_matching(arch: Architecture, pattern: str) -> list[str]:
    """The paths of the modules that a pattern matches from end to end, in the order of the model."""
    return [path for path in arch.modules if re.fullmatch(pattern, path)]


def missing_kinds(start: TrainingStart, support: ModelSupport) -> list[str]:
    """The kinds of layers that the trainer trains by default and the LoRA does not have."""
    kinds = dict.fromkeys(start.arch.modules[path].kind.name for path in modules_matching(start.arch, support.default))
    return [kind for kind in kinds if kind not in start.kinds]


def short_names(kinds: Iterable[str]) -> list[str]:
    """The ends of kinds' names by which PEFT tells them apart: ``to_q``, ``img_mlp.net.2``, ``w1``."""
    return [re.sub(r"^(attn|attention|feed_forward)\.", "", kind) for kind in kinds]
