"""SD.Next: A1111's callbacks and folders, a LoRA list and a model manager of its own."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, ClassVar

from i2l_ext.webui.hosts.webui import WebUIHost


class SDNextHost(WebUIHost):
    """It has Z-Image and Qwen-Image. A LoRA is ``<lora:NAME:1>`` there too; the dots in a name may stay."""

    name = "sdnext"
    title = "SD.Next"
    applies_loras = True
    runs_pipelines = True

    credential_flags: ClassVar = ("auth", "api_auth")
    credential_files: ClassVar = ("auth_file",)
    language_option: ClassVar = "ui_locale"

    @classmethod
    def is_running(cls) -> bool:
        return find_spec("modules.lora") is not None  # a package that it alone has

    def refresh_loras(self) -> None:
        from modules.lora import lora_load

        lora_load.list_available_networks()

    def _unload(self) -> Any:
        from modules import sd_models

        if self._model() is not None:  # the next picture loads it again
            sd_models.unload_model_weights(op="model")
