"""What every trainer's file describes: which modules it trains, which dialect it reads, and how it is started."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..architectures import Architecture
from ..errors import UserError

QUOTED: Mapping[str, Callable[[str], str]] = {
    "sh": shlex.quote,
    "yaml": partial(json.dumps, ensure_ascii=False),  # YAML does not join the two halves of an escaped emoji
    "py": repr,
}
"""Kind of file -> how a text from outside is written into it, where it has no control characters. Every name and path
goes through this."""

UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")
"""Kinds of characters that no path may have: control codes, bytes that are no UTF-8, breaks of lines and paragraphs."""

NONCHARACTERS = "\ufffe\uffff"
"""What YAML refuses besides."""


@dataclass(frozen=True)
class Quoted:
    """The path of the LoRA to start from and the run's name, with their quotes."""

    init: str
    name: str


@dataclass(frozen=True)
class TrainingStart:
    """The start of a training run: what a trainer's texts are made of.

    ``init``: absolute path of the LoRA to start from; ``name``: a run name that no earlier run has had; ``paths``: the
    modules in that LoRA. In a comment path and name stand as they are, elsewhere as `quoted`. Raises UserError where
    one of them has a control character, which would end a comment.
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

    def __post_init__(self) -> None:
        for text in (self.init.as_posix(), self.name):
            if any(unicodedata.category(char) in UNWRITABLE or char in NONCHARACTERS for char in text):
                raise UserError(f"{text!r} has a line break or another control character in it. Rename it.")

    def quoted(self, language: str) -> Quoted:
        """The texts from outside as a file of this kind has them: sh, yaml or py."""
        quote = QUOTED[language]
        return Quoted(init=quote(self.init.as_posix()), name=quote(self.name))


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
