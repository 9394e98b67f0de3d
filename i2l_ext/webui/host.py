"""Where the tab stands: in a WebUI, or alone. The only file that touches a WebUI's own modules."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext.engine.process import ROOT
from i2l_ext.library.folder import find_lora_folder
from i2l_ext.webui.settings import OPTIONS, Stored

if TYPE_CHECKING:
    from i2l_ext.engine.queue import Job

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
MOST_FILES = 5000


class Alone:
    """No WebUI: a page of our own. ``name`` is what the sidecar's ``sd version`` goes by."""

    name = ""
    title = "stand-alone"
    applies = False
    alone = True

    def __init__(self, state: Path, *, lora_folder: Path | None = None, local: bool = True, api: bool = False) -> None:
        self.local, self.api = local, api
        self.stored = Stored(state / "settings.json")
        self._folder = lora_folder or find_lora_folder(ROOT) or Path("models", "Lora").absolute()

    def option(self, key: str) -> Any:
        return self.stored.read()[key]

    def lora_folder(self) -> Path:
        """Where LoRAs are written."""
        named = self.option("i2l_lora_folder")
        return (Path(named) if named else self._folder).absolute()  # the engine works in a folder of its own

    def lora_folders(self) -> list[Path]:
        """Where LoRAs are looked for."""
        return [self.lora_folder()]

    def models_folders(self) -> list[Path]:
        """Where weights are looked for, downloads first."""
        named = [self.option("i2l_models_folder"), *os.environ.get("I2L_MODELS", "").split(os.pathsep)]
        return [Path(name).expanduser().absolute() for name in named if name]

    def loras(self) -> dict[str, Path]:
        """Every LoRA of the folders, by its path below them, the newest first."""
        found = []
        for folder in self.lora_folders():
            for path in islice(_below(folder, ".safetensors"), MOST_FILES):
                with suppress(OSError):  # it may go while we look
                    found.append((-path.stat().st_mtime, path.relative_to(folder).as_posix(), path))
        return {shown: path for _, shown, path in sorted(found)}

    def refresh(self) -> None:
        """Let the host know that LoRAs have come or changed."""

    def room(self, job: Job) -> AbstractContextManager[Any]:
        """What is held while a job runs."""
        return nullcontext()


class WebUI(Alone):
    """AUTOMATIC1111, Forge or Forge Neo, by what they have in common and what hosts.md says of the rest."""

    alone = False

    def __init__(self) -> None:
        from modules import paths, shared

        self._shared, self._paths = shared, paths
        flags = shared.cmd_opts
        neo = hasattr(flags, "lora_dirs")
        forge = neo or "modules_forge" in sys.modules or (Path(paths.script_path) / "modules_forge").is_dir()
        self.name = "forge-neo" if neo else "forge" if forge else "a1111"
        self.title = {"forge-neo": "Forge Neo", "forge": "Forge", "a1111": "AUTOMATIC1111"}[self.name]
        self.applies = neo
        exposed = getattr(flags, "listen", False) or getattr(flags, "share", False) or getattr(flags, "ngrok", None)
        server = getattr(flags, "server_name", None)
        self.local = not exposed and (not server or server in LOCAL)
        self.api = bool(getattr(flags, "api", False))

    def option(self, key: str) -> Any:
        option = next(option for option in OPTIONS if option.key == key)
        return option.sound(getattr(self._shared.opts, key, option.default))

    def lora_folder(self) -> Path:
        named = self.option("i2l_lora_folder")
        return Path(named or getattr(self._shared.cmd_opts, "lora_dir", None) or self._models() / "Lora").absolute()

    def lora_folders(self) -> list[Path]:
        more = getattr(self._shared.cmd_opts, "lora_dirs", None) or ()
        return list(dict.fromkeys((self.lora_folder(), *(Path(folder).absolute() for folder in more))))

    def models_folders(self) -> list[Path]:
        return [*super().models_folders(), self._models() / "i2l"]

    def _models(self) -> Path:
        return Path(self._paths.models_path)

    def refresh(self) -> None:
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
    def room(self, job: Job) -> Iterator[None]:
        """For a job that computes: the WebUI's model leaves the card, and its queue waits until we are done."""
        if job.lane != "work" or job.kind == "download" or not self.option("i2l_free_vram"):
            yield
            return
        from modules import call_queue

        with call_queue.queue_lock:
            if job.state == "waiting":  # it may have been cancelled while it stood in line
                self._free_vram()
            yield

    def _free_vram(self) -> None:
        from modules import devices, sd_models

        drop = getattr(sd_models, "unload_model_weights", None)
        if drop is not None and (self.name != "a1111" or getattr(sd_models.model_data, "sd_model", None) is not None):
            drop()
        gc.collect()
        devices.torch_gc()


def _below(folder: Path, suffix: str) -> Iterator[Path]:
    """The files in a folder and below it whose names end so; a folder that cannot be read is passed over."""
    for root, _, files in os.walk(folder):
        yield from (Path(root, name) for name in files if name.endswith(suffix))


def in_webui() -> bool:
    return "modules.shared" in sys.modules


def register(tabs: Callable[[], Any], settings: Callable[[], Any], started: Callable[[Any, Any], None]) -> None:
    """Tell the WebUI what to call for its tabs, its settings page, and once its server runs."""
    from modules import script_callbacks

    script_callbacks.on_ui_tabs(tabs)
    script_callbacks.on_ui_settings(settings)
    script_callbacks.on_app_started(started)


def add_settings(options: Mapping[str, tuple[Any, str, Any, Any, str]]) -> None:
    """Put options on the WebUI's settings page: {key: (default, label, component, its arguments, tip)}."""
    from modules import shared

    section = ("i2l", "Image to LoRA")
    for key, (default, label, component, arguments, tip) in options.items():
        info = shared.OptionInfo(default, label, component, arguments, section=section)
        shared.opts.add_option(key, info.info(tip) if hasattr(info, "info") else info)


def credentials() -> list[tuple[str, str]]:
    """User names and passwords of the WebUI's own API, and of its page."""
    from modules import shared

    texts: list[str] = []
    for flag in ("api_auth", "gradio_auth"):
        texts += (getattr(shared.cmd_opts, flag, None) or "").split(",")
    if path := getattr(shared.cmd_opts, "gradio_auth_path", None):
        for line in Path(path).read_text(encoding="utf8").splitlines():
            texts += line.split(",")
    pairs = [text.strip().partition(":") for text in texts if ":" in text]
    return [(user, password) for user, _, password in pairs]
