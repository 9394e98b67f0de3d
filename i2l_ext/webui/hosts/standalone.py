"""No WebUI: the tab is a page of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from i2l_ext.engine.job import Job
from i2l_ext.engine.process import ROOT
from i2l_ext.library.folder import find_lora_folder
from i2l_ext.webui.hosts.base import named_models_folders
from i2l_ext.webui.settings import SettingsFile


class StandaloneHost:
    """A Host without a WebUI. ``state``: the folder for the settings; ``lora_folder``: unless the settings name one."""

    name = ""
    title = "stand-alone"
    applies_loras = False

    def __init__(
        self, state: Path, *, lora_folder: Path | None = None, is_local: bool = True, serves_api: bool = False
    ) -> None:
        self.is_local, self.serves_api = is_local, serves_api
        self.settings_file: SettingsFile | None = SettingsFile(state / "settings.json")
        self._file = self.settings_file
        self._folder = lora_folder or find_lora_folder(ROOT) or Path("models", "Lora").absolute()

    def option(self, key: str) -> Any:
        return self._file.read()[key]

    def language(self) -> str:
        return ""

    def lora_folder(self) -> Path:
        named = self.option("i2l_lora_folder")
        return (Path(named) if named else self._folder).absolute()

    def lora_folders(self) -> list[Path]:
        return [self.lora_folder()]

    def models_folders(self) -> list[Path]:
        return named_models_folders(self.option("i2l_models_folder"))

    def refresh_loras(self) -> None:
        """Nobody keeps a list."""

    def exclusive_gpu(self, job: Job) -> AbstractContextManager[Any]:
        return nullcontext()
