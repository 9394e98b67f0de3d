"""Forge (lllyasviel), reForge and Forge Classic: they load what they need onto the card for each picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from i2l_ext.webui.hosts.webui import WebUIHost

FORGE_1_MEMORY = "ldm_patched.modules.model_management"
"""The module that manages memory in reForge and Forge Classic. In Forge and Forge Neo it is another."""


class ForgeHost(WebUIHost):
    """Like A1111's, its models are not those that the LoRAs are for."""

    name = "forge"

    def __init__(self) -> None:
        super().__init__()
        self.title = "reForge or Forge Classic" if FORGE_1_MEMORY in sys.modules else "Forge"

    @classmethod
    def is_running(cls) -> bool:
        from modules import paths

        return "modules_forge" in sys.modules or Path(paths.script_path, "modules_forge").is_dir()

    def refresh_loras(self) -> None:
        """It also keeps the tensors of some LoRAs by their file's name, and which LoRAs its model has now."""
        cached: Any = getattr(sys.modules.get("networks"), "load_lora_state_dict", None)
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
        model = self._model()
        if hasattr(model, "current_lora_hash"):
            model.current_lora_hash = None
        super().refresh_loras()

    def _unload(self) -> Any:
        from modules import sd_models

        if memory := sys.modules.get(FORGE_1_MEMORY):
            memory.unload_all_models()
        else:
            sd_models.unload_model_weights()
