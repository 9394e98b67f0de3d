"""Requests on LoRA files: look into them, and write them anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.key_formats import KEY_FORMATS
from i2l_ext.converters.rank import RANK_LIMIT
from i2l_ext.converters.trainers import TRAINERS
from i2l_ext.requests.fields import Request, option
from i2l_ext.requests.make import DTYPES, LOSSY, OWN_FORMATS

BLOCKS = "keep or scale blocks: 0-19 or 0-19:0.5,late:1.2"
KINDS = "keep or scale kinds of layers: attn or txt:0,mlp:0.5"
OUTPUT = "file to write; beside the first one unless given"
ONE_OR_ALL = "the LoRA, or a folder of them: then the output is a folder too"
OVERWRITE = "replace the output if it exists"
TO = ("--to", "--format")


def _file(help: str = "the LoRA, or the folder that PEFT or diffusers has written") -> Path:
    return option(help, flags=(), local=True)


def _key_format(help: str) -> str | None:
    return option(help, None, choices=tuple(KEY_FORMATS), flags=TO)


def _output(help: str = OUTPUT, metavar: str | None = None) -> Path | None:
    return option(help, None, flags=("-o", "--output"), metavar=metavar, local=True)


def _dtype(default: str) -> str | None:
    return option(f"dtype of the factors; {default} unless given", None, choices=tuple(DTYPES))


def _base(what_for: str) -> Path | None:
    help = f"the base model's weights, {what_for}: a checkpoint, or a folder with its files"
    return option(help, None, metavar="CHECKPOINT", local=True)


def _alpha() -> float | None:
    help = "alpha of every module, for a file that does not say its own (scale = alpha / rank)"
    return option(help, None, nonzero=True, metavar="A")


def _rank(help: str) -> int | None:
    return option(help, None, minimum=1, maximum=RANK_LIMIT, metavar="K")


@dataclass(frozen=True)
class InspectRequest(Request):
    """What a LoRA file is: model, key format, ranks, values, maker. ``header``: the values are not read."""

    kind: ClassVar[str] = "inspect"

    file: Path = _file()
    header: bool = option("do not read the values", False)
    plot: Path | None = option("draw the size of the update and its spectrum", None, metavar="PNG", local=True)
    base: Path | None = _base("which the plot of a DoRA needs")
    overwrite: bool = option("replace the picture if it exists", False, local=True)


@dataclass(frozen=True)
class CheckRequest(Request):
    """Who loads a LoRA file, who does not, and what repairs it; and whether it fits a base model."""

    kind: ClassVar[str] = "check"

    file: Path = _file(ONE_OR_ALL)
    base: Path | None = option("a base model's checkpoint or folder: does the LoRA fit it?", None, local=True)


@dataclass(frozen=True)
class RankCurveRequest(Request):
    """How much of a LoRA's effect each rank keeps."""

    kind: ClassVar[str] = "curve"

    file: Path = _file()


@dataclass(frozen=True)
class ConvertRequest(Request):
    """Write a LoRA in another key format: that of its architecture unless one is named."""

    kind: ClassVar[str] = "convert"

    file: Path = _file(ONE_OR_ALL)
    key_format: str | None = _key_format(f"key format (default: {OWN_FORMATS})")
    output: Path | None = _output()
    overwrite: bool = option(OVERWRITE, False, local=True)
    rank: int | None = _rank(
        "nearest LoRA of this rank, where a module has a higher one; LoKr, LoHa and others become one"
    )
    base: Path | None = _base("which a DoRA needs")
    dtype: str | None = _dtype("as in the file")
    alpha: float | None = _alpha()
    lossy: bool = option(LOSSY, False)
    blocks: str | None = option(BLOCKS, None, metavar="LIST")
    kinds: str | None = option(KINDS, None, metavar="LIST")


@dataclass(frozen=True)
class RankRequest(Request):
    """Change the rank: the nearest LoRA of a lower one, or room to learn. Give ``rank`` or ``effect_kept``, a share
    above 0 and up to 1."""

    kind: ClassVar[str] = "rank"

    file: Path = _file(ONE_OR_ALL)
    rank: int | None = _rank("rank of every module")
    effect_kept: float | None = option(
        "smallest rank that keeps this share of the effect, such as 0.99", None, metavar="SHARE"
    )
    per_module: bool = option("each module its own rank, for the same size or share", False)
    exact: bool = option("compute in float64", False)
    seed: int = option("seed of fresh rows where the rank grows", 0, minimum=0)
    key_format: str | None = _key_format("key format; that of the (first) file unless given")
    output: Path | None = _output()
    overwrite: bool = option(OVERWRITE, False, local=True)
    dtype: str | None = _dtype("fp32")
    alpha: float | None = _alpha()
    lossy: bool = option(LOSSY, False)

    def validate(self) -> None:
        """Raises UserError where a value is out of its range, or not one of rank and effect_kept is given."""
        super().validate()
        if (self.rank is None) == (self.effect_kept is None):
            raise UserError("Give a rank or a share of the effect to keep, one of the two.", "bad_request")
        if self.effect_kept is not None and not 0 < self.effect_kept <= 1:
            raise UserError(
                f"effect kept must be a share above 0 and up to 1, such as 0.99, not {self.effect_kept:g}.",
                "out_of_range",
            )


@dataclass(frozen=True)
class MergeRequest(Request):
    """One LoRA from several, each with a weight: ``parts`` are texts FILE or FILE:WEIGHT."""

    kind: ClassVar[str] = "merge"

    parts: tuple[str, ...] = option(
        "such as a.safetensors:0.7 b.safetensors:0.3", flags=(), metavar="FILE[:WEIGHT]", local=True
    )
    rank: int | None = _rank("bring the result to this rank; else the ranks add up")
    key_format: str | None = _key_format("key format; that of the (first) file unless given")
    output: Path | None = _output()
    overwrite: bool = option(OVERWRITE, False, local=True)
    dtype: str | None = _dtype("as in the files where the weights lose no digit, else fp32")
    lossy: bool = option(LOSSY, False)
    blocks: str | None = option(BLOCKS, None, metavar="LIST")
    kinds: str | None = option(KINDS, None, metavar="LIST")


@dataclass(frozen=True)
class ExportRequest(Request):
    """Write a start folder for a training run: start file, command or configuration, self-check."""

    kind: ClassVar[str] = "export"

    file: Path = _file()
    trainer: str = option("the trainer", choices=tuple(TRAINERS), flags=("--for",))
    rank: int | None = _rank("rank to train at; that at which nothing is lost unless given")
    output: Path | None = _output("folder to write; FILE_TRAINER unless given", "FOLDER")
    fill: bool = option("write fresh modules for what the trainer trains besides", False)
    exact: bool = option("compute in float64", False)
    seed: int = option("seed of fresh rows", 0, minimum=0)
    alpha: float | None = _alpha()
    pictures: tuple[Path, ...] = option(
        "pictures or folders to train on; those that made the LoRA, as far as they are found, unless given",
        (),
        local=True,
    )
    caption: str | None = option(
        "prompt of every picture, such as a trigger word; it replaces the .txt captions beside them; those or the "
        "LoRA's activation text unless given",
        None,
    )
    models: tuple[Path, ...] = option(
        "further folders to look for the base model in, beside those of WebUIs and hubs", (), local=True
    )
    overwrite: bool = option(
        "replace the files of the start there, but keep the paths of the base model in its train.py", False, local=True
    )


@dataclass(frozen=True)
class RepairRequest(Request):
    """Do for a file what ``check`` advises for one program (``consumer``). ``output`` is the file, ``folder`` the
    start folder, of which one is written."""

    kind: ClassVar[str] = "repair"

    file: Path = _file()
    consumer: str = option("the program that is to load it")
    output: Path = option("file to write", local=True)
    folder: Path = option("folder to write, where the advice is an export", local=True)


ADVICE: Mapping[str, type[Request]] = {"convert": ConvertRequest, "rank": RankRequest, "export": ExportRequest}
"""What ``check`` may advise."""


def weighted_file(part: str) -> tuple[Path, float]:
    """FILE:WEIGHT, or FILE, which has weight 1. A Windows drive's colon belongs to the file.

    Raises UserError for a weight that is not finite.
    """
    name, colon, number = part.rpartition(":")
    try:
        weight = float(number) if colon and name else 1.0
    except ValueError:
        return Path(part), 1.0
    if not math.isfinite(weight):
        raise UserError(f"{part}: {number} is not a weight.")
    return Path(name if colon and name else part), weight
