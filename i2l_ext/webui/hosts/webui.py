"""What all WebUIs of AUTOMATIC1111's kind share. Only the files of this folder import a WebUI's own modules.

Which one it is, and what it can do, is found by looking for the modules and attributes that make the difference. The
names of modules that a WebUI may lack are looked up in ``sys.modules``.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from i2l_ext.engine.job import Job
from i2l_ext.service.host import LOCAL_ADDRESSES, named_models_folders
from i2l_ext.service.settings import SETTINGS, SettingsFile


class WebUIHost:
    """A Host that is a WebUI, in whose process we run. Each WebUI has a subclass, which says how it differs."""

    name = ""
    title = "WebUI"
    applies_loras = False
    runs_pipelines = False
    """Whether its models are pipelines of diffusers."""
    settings_file: SettingsFile | None = None

    credential_flags: ClassVar = ("api_auth", "gradio_auth")
    credential_files: ClassVar = ("gradio_auth_path",)
    language_option: ClassVar = "localization"
    lora_flag: ClassVar = "lora_dir"

    @classmethod
    def is_running(cls) -> bool:
        """Whether this process is that WebUI."""
        return False

    def __init__(self) -> None:
        from modules import paths, shared

        self._shared, self._paths = shared, paths
        flags = shared.cmd_opts
        exposed = getattr(flags, "listen", False) or getattr(flags, "share", False) or getattr(flags, "ngrok", None)
        server = getattr(flags, "server_name", None)
        self.is_local = not exposed and (not server or server in LOCAL_ADDRESSES)
        self.serves_api = bool(getattr(flags, "api", False))

    def option(self, key: str) -> Any:
        setting = next(one for one in SETTINGS if one.key == key)
        return setting.valid_or_default(getattr(self._shared.opts, key, setting.default))

    def language(self) -> str:
        named = str(getattr(self._shared.opts, self.language_option, None) or "")
        return "" if named in ("None", "Auto") else named

    def lora_folder(self) -> Path:
        named = self.option("i2l_lora_folder") or getattr(self._shared.cmd_opts, self.lora_flag, None)
        return Path(named or self._models() / "Lora").absolute()

    def lora_folders(self) -> list[Path]:
        return [self.lora_folder()]

    def models_folders(self) -> list[Path]:
        return [*named_models_folders(self.option("i2l_models_folder")), self._models() / "i2l"]

    def _models(self) -> Path:
        return Path(self._paths.models_path)

    def refresh_loras(self) -> None:
        """Add to the WebUI's own dictionary what is new, and drop what is gone. Its own refresh empties the dictionary
        first, without a lock: one that runs at the same time, from a page, would show cards of half of it."""
        networks: Any = sys.modules.get("networks")
        if networks is None:
            return
        add = getattr(networks, "update_available_networks_by_names", None)
        if add is None:
            networks.list_available_networks()
            return
        add([])  # no names: all
        for name, entry in list(networks.available_networks.items()):
            if not Path(entry.filename).is_file():
                networks.available_networks.pop(name, None)

    @contextmanager
    def exclusive_gpu(self, job: Job) -> Iterator[None]:
        """For a job that computes: the WebUI's model leaves the card, and its own queue waits until the job ends."""
        if job.lane != "work" or job.kind == "download" or not self.option("i2l_free_vram"):
            yield
            return
        from modules import call_queue

        with call_queue.queue_lock:
            # it may have been cancelled while it waited for the lock
            model = self._free_vram() if job.state == "waiting" else None
            try:
                yield
            finally:
                if model is not None:
                    self._bring_back(model)

    def _free_vram(self) -> Any:
        """Take the WebUI's model off the card. What has to be brought back; None where the WebUI does that itself."""
        from modules import devices

        model = self._unload()
        gc.collect()
        devices.torch_gc()
        return model

    def _unload(self) -> Any:
        """As ``_free_vram``, but for the memory that Python and torch still hold."""

    def _bring_back(self, model: Any) -> None:
        """Put on the card again what ``_unload`` gave."""

    def _model(self) -> Any:
        """The checkpoint that is loaded, or None. ``shared.sd_model`` is not read: that loads one."""
        from modules import sd_models

        return getattr(sd_models.model_data, "sd_model", None)

    def credentials(self) -> list[tuple[str, str]]:
        """User names and passwords of the WebUI's own API, and of its page."""
        flags = self._shared.cmd_opts
        texts: list[str] = []
        for flag in self.credential_flags:
            texts += (getattr(flags, flag, None) or "").split(",")
        for flag in self.credential_files:
            if path := getattr(flags, flag, None):
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


def register_network(network: Any) -> None:
    """Tell the WebUI of a network that prompts can name, each time its page is built."""
    from modules import extra_networks, script_callbacks

    script_callbacks.on_before_ui(lambda: extra_networks.register_extra_network(network))


def add_settings(settings: Mapping[str, tuple[Any, str, Any, Any, str]]) -> None:
    """Put settings on the WebUI's settings page: {key: (default, label, component, its arguments, tip)}."""
    from modules import shared

    section = ("i2l", "Image to LoRA")
    for key, (default, label, component, arguments, tip) in settings.items():
        info = shared.OptionInfo(default, label, component, arguments, section=section)
        shared.opts.add_option(key, info.info(tip) if hasattr(info, "info") else info)
