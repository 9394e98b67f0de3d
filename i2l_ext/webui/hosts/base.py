"""What the tab needs to know of the program it runs in, and what all hosts share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from i2l_ext.engine.job import Job
from i2l_ext.webui.settings import SettingsFile

LOCAL_ADDRESSES = frozenset({"127.0.0.1", "localhost", "::1"})
MAX_FILES = 5000
"""LoRAs of one folder that are listed."""


class Host(Protocol):
    """A program that shows the tab."""

    name: str
    """One of the hosts of MakeRequest; "" for none of them."""

    title: str
    """For people."""

    applies_loras: bool
    """Whether it can generate with LoRAs for Qwen-Image and Z-Image."""

    is_local: bool
    """Whether only this machine reaches the page."""

    serves_api: bool
    """Whether the HTTP interface is switched on."""

    settings_file: SettingsFile | None
    """Where the tab keeps its settings; None where the host keeps them and has a page for them."""

    def option(self, key: str) -> Any:
        """The value of one of SETTINGS."""

    def language(self) -> str:
        """The language that was chosen in the host, such as ``zh_CN`` or ``ru: Russian``; "" where none was."""

    def lora_folder(self) -> Path:
        """Where LoRAs are written; absolute."""

    def lora_folders(self) -> list[Path]:
        """Where LoRAs are looked for; absolute."""

    def models_folders(self) -> list[Path]:
        """Where model files are looked for, the folder of downloads first; absolute."""

    def refresh_loras(self) -> None:
        """Tell the host that LoRAs were added or changed."""

    def exclusive_gpu(self, job: Job) -> AbstractContextManager[Any]:
        """What is held while a job runs, so that the engine has the graphics card to itself."""


def list_loras(folders: Iterable[Path]) -> dict[str, Path]:
    """Every LoRA in folders and below, by its path below its folder, the newest first."""
    found = []
    for folder in folders:
        for path in islice(_files_below(folder, ".safetensors"), MAX_FILES):
            with suppress(OSError):  # it may be removed meanwhile
                found.append((-path.stat().st_mtime, path.relative_to(folder).as_posix(), path))
    return {shown: path for _, shown, path in sorted(found)}


def named_models_folders(setting: str) -> list[Path]:
    """The folders for model files that the setting and ``I2L_MODELS`` name."""
    named = [setting, *os.environ.get("I2L_MODELS", "").split(os.pathsep)]
    return [Path(name).expanduser().absolute() for name in named if name]


def _files_below(folder: Path, suffix: str) -> Iterator[Path]:
    """The files in a folder and below it whose names end so. A folder that cannot be read is skipped."""
    for root, _, files in os.walk(folder):
        yield from (Path(root, name) for name in files if name.endswith(suffix))
