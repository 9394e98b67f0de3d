"""What can be asked of a start folder: run the trainer from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from i2l_ext.requests.fields import Request, option


@dataclass(frozen=True)
class RunRequest(Request):
    """Run a trainer from a start folder, and take what it makes. ``folder``: as an export wrote it."""

    kind: ClassVar[str] = "run"

    folder: Path = option("the start folder that `i2l export` wrote", flags=(), metavar="FOLDER", local=True)
    trainer_folder: Path = option("the trainer's own folder, where it is installed", flags=("--in",), local=True)
    python: Path | None = option(
        "the trainer's Python; that of the environment in its folder unless given", None, local=True
    )
    output: Path | None = option(
        "LoRA file to write; beside the start folder, named after the run, unless given", None,
        flags=("-o", "--output"), local=True,
    )  # fmt: skip
    overwrite: bool = option("replace the file of that name", False, local=True)
