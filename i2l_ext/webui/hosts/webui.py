"""AUTOMATIC1111, Forge and Forge Neo. Beside generation.py the only file that imports a WebUI's own modules.

Which one it is, and what it can do, is found by looking for the modules and attributes that make the difference. The
names of modules that a WebUI may lack are looked up in ``sys.modules``.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from i2l_ext.engine.job import Job
from i2l_ext.service.host import LOCAL_ADDRESSES, named_models_folders
from i2l_ext.service.settings import SETTINGS, SettingsFile

TITLES = {"forge-neo": "Forge Neo", "forge": "Forge", "a1111": "AUTOMATIC1111"}


class WebUIHost:
    """A Host that is a WebUI, in whose process we run."""

    settings_file: SettingsFile | None = None

    def __init__(self) -> None:
        from modules import paths, shared

        self._shared, self._paths = shared, paths
        flags = shared.cmd_opts
        runs_qwen_image = hasattr(flags, "lora_dirs")  # an option of Forge Neo alone
        manages_memory = "modules_forge" in sys.modules or (Path(paths.script_path) / "modules_forge").is_dir()
        self.name = "forge-neo" if runs_qwen_image else "forge" if manages_memory else "a1111"
        self.title = TITLES[self.name]
        self.applies_loras = runs_qwen_image
        self._manages_memory = runs_qwen_image or manages_memory
        exposed = getattr(flags, "listen", False) or getattr(flags, "share", False) or getattr(flags, "ngrok", None)
        server = getattr(flags, "server_name", None)
        self.is_local = not exposed and (not server or server in LOCAL_ADDRESSES)
        self.serves_api = bool(getattr(flags, "api", False))

    def option(self, key: str) -> Any:
        setting = next(one for one in SETTINGS if one.key == key)
        return setting.valid_or_default(getattr(self._shared.opts, key, setting.default))

    def lora_folder(self) -> Path:
        named = self.option("i2l_lora_folder")
        return Path(named or getattr(self._shared.cmd_opts, "lora_dir", None) or self._models() / "Lora").absolute()

    def lora_folders(self) -> list[Path]:
        more = getattr(self._shared.cmd_opts, "lora_dirs", None) or ()
        return list(dict.fromkeys((self.lora_folder(), *(Path(folder).absolute() for folder in more))))

    def models_folders(self) -> list[Path]:
        return [*named_models_folders(self.option("i2l_models_folder")), self._models() / "i2l"]

    def _models(self) -> Path:
        return Path(self._paths.models_path)

    def refresh_loras(self) -> None:
        networks: Any = sys.modules.get("networks")
        if networks is None:
            return
        cached: Any = getattr(networks, "load_lora_state_dict", None)
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
        model: Any = getattr(self._shared, "sd_model", None)
        if hasattr(model, "current_lora_hash"):
            model.current_lora_hash = None
        networks.list_available_networks()

    @contextmanager
    def exclusive_gpu(self, job: Job) -> Iterator[None]:
        """For a job that computes: the WebUI's model leaves the card, and its own queue waits until the job ends."""
        if job.lane != "work" or job.kind == "download" or not self.option("i2l_free_vram"):
            yield
            return
        from modules import call_queue

        with call_queue.queue_lock:
            if job.state == "waiting":  # it may have been cancelled while it waited for the lock
                self._free_vram()
            yield

    def _free_vram(self) -> None:
        from modules import devices, sd_models

        unload = getattr(sd_models, "unload_model_weights", None)
        # A1111, which does not manage memory itself, raises where no model is loaded
        if unload is not None and (self._manages_memory or getattr(sd_models.model_data, "sd_model", None) is not None):
            unload()
        gc.collect()
        devices.torch_gc()

    def credentials(self) -> list[tuple[str, str]]:
        """User names and passwords of the WebUI's own API, and of its page."""
        flags = self._shared.cmd_opts
        texts: list[str] = []
        for flag in ("api_auth", "gradio_auth"):
            texts += (getattr(flags, flag, None) or "").split(",")
        if path := getattr(flags, "gradio_auth_path", None):
            for line in Path(path).read_text(encoding="utf8").splitlines():
                texts += line.split(",")
        pairs = [text.strip().partition(":") for text in texts if ":" in text]
        return [(user, password) for user, _, password in pairs]


def register_callbacks(
    tabs: Callable[[], Any], settings: Callable[[], Any], started: Callable[[Any, Any], None]
) -> None:
    """Tell the WebUI what to call for its tabs, for its settings page, and once its server runs."""
    from modules import script_callbacks

    script_callbacks.on_ui_tabs(tabs)
    script_callbacks.on_ui_settings(settings)
    script_callbacks.on_app_started(started)


def add_settings(settings: Mapping[str, tuple[Any, str, Any, Any, str]]) -> None:
    """Put settings on the WebUI's settings page: {key: (default, label, component, its arguments, tip)}."""
    from modules import shared

    section = ("i2l", "Image to LoRA")
    for key, (default, label, component, arguments, tip) in settings.items():
        info = shared.OptionInfo(default, label, component, arguments, section=section)
        shared.opts.add_option(key, info.info(tip) if hasattr(info, "info") else info)
