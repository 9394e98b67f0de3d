"""Forge Neo: a Forge that has Qwen-Image and Z-Image, and several LoRA folders."""

from __future__ import annotations

from pathlib import Path

from i2l_ext.webui.hosts.forge import ForgeHost


class ForgeNeoHost(ForgeHost):
    name = "forge-neo"
    applies_loras = True

    def __init__(self) -> None:
        super().__init__()
        self.title = "Forge Neo"

    @classmethod
    def is_running(cls) -> bool:
        from modules import shared

        return hasattr(shared.cmd_opts, "lora_dirs")  # an option that it alone has

    def lora_folders(self) -> list[Path]:
        more = getattr(self._shared.cmd_opts, "lora_dirs", None) or ()
        return list(dict.fromkeys((self.lora_folder(), *(Path(folder).absolute() for folder in more))))
