"""Requests on the LoRA library: what lies there, and putting files into the trash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from i2l_ext.requests.fields import Request, option


@dataclass(frozen=True)
class LibraryRequest(Request):
    """The LoRAs of folders and their sub-folders: what each is, how it was made, who loads it. Only headers are read,
    and those of files that have not changed are remembered."""

    kind: ClassVar[str] = "library"

    folders: tuple[Path, ...] = option("a folder of LoRAs", flags=(), metavar="FOLDER", local=True)


@dataclass(frozen=True)
class DiscardRequest(Request):
    """Move LoRAs with their previews and cards into the system's trash, or into the folder .trash beside them."""

    kind: ClassVar[str] = "discard"

    files: tuple[Path, ...] = option("a LoRA file", flags=(), metavar="FILE", local=True)
