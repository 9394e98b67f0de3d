"""The settings: one table, shown on the WebUI's settings page, or in a pane of the tab where there is no WebUI."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from i2l_ext.converters import atomic
from i2l_ext.requests import EngineOptions, MakeRequest

if TYPE_CHECKING:
    from i2l_ext.service.host import Host

AS_MADE = "as made"
"""Shown for a field of MakeRequest that is left out."""

AUTOMATIC = "automatic"
"""The key format of the model's architecture, where a setting names another."""

HUB_TITLES = {"Hugging Face": "huggingface", "ModelScope": "modelscope"}
"""Name on the page -> ``source`` of a DownloadRequest."""

_MAKE, _ENGINE = MakeRequest.fields(), EngineOptions.fields()
KEY_FORMAT_CHOICES = (AUTOMATIC, *_MAKE["key_format"].info.choices)
DTYPE_CHOICES = (AS_MADE, *_MAKE["dtype"].info.choices)


@dataclass(frozen=True)
class Setting:
    """``choices``: for a drop-down list; () for a text or, by the default's type, a tick box or a number. ``folder``:
    a path on this machine, shown to and taken from local pages only."""

    key: str
    default: Any
    label: str
    tip: str
    choices: Sequence[str] = ()
    folder: bool = False

    def valid_or_default(self, value: Any) -> Any:
        """The value; the default where the value is of another kind or out of range."""
        if self.choices:
            return value if value in self.choices else self.default
        if isinstance(self.default, bool) or not isinstance(self.default, (int, float)):
            return value if isinstance(value, type(self.default)) else self.default
        return value if isinstance(value, (int, float)) and isfinite(value) and value >= 0 else self.default


SETTINGS = (
    Setting("i2l_models_folder", "", "Models folder", "Where downloaded models are saved. Empty: models/i2l of the "
            "WebUI; stand-alone: your user data folder.", folder=True),
    Setting("i2l_lora_folder", "", "LoRA folder", "Where LoRAs are saved. Empty: the WebUI's LoRA folder.",
            folder=True),
    Setting("i2l_diffsynth", "", "DiffSynth-Studio", "The folder of an environment in which it is installed; the v2 "
            "models run through it. Empty: the one that Models sets up.", folder=True),
    Setting("i2l_trainer", "", "Trainer's folder", "The folder of the trainer that you use, such as musubi-tuner. With "
            "it a training can be started and watched in the tab. Empty: off.", folder=True),
    Setting("i2l_trainer_python", "", "Trainer's Python", "The Python in the trainer's environment. Empty: that of "
            ".venv or venv in its folder.", folder=True),
    Setting("i2l_device", _ENGINE["device"].default, "Device", "Where the engine computes. auto: the graphics card if "
            "there is one.", ("auto", "cpu", "cuda", "cuda:0", "cuda:1", "mps")),
    Setting("i2l_precision", _ENGINE["precision"].default, "Precision", "Number format in which the encoders are "
            "computed. auto: what the device supports and each encoder tolerates; the bug report shows it.",
            tuple(_ENGINE["precision"].info.choices)),
    Setting("i2l_memory", "", "Memory limit", "RAM or VRAM, such as 6GB: the engine stays within it, and is slower. "
            "Empty: no limit."),
    Setting("i2l_model", "", "Default model", "The model that is chosen when the page opens. Empty: your first "
            "downloaded model, else mini."),
    Setting("i2l_key_format", AUTOMATIC, "Default key format", "Chosen under Advanced when the page opens.",
            KEY_FORMAT_CHOICES),
    Setting("i2l_dtype", AS_MADE, "Default number format", "Chosen under Advanced when the page opens.",
            DTYPE_CHOICES),
    Setting("i2l_subfolder", "", "Default sub-folder", "Inside the LoRA folder."),
    Setting("i2l_cache_gb", 2, "Cache size in GB", "Encoder cache: making a LoRA from the same pictures again is fast. "
            "0 turns it off."),
    Setting("i2l_free_vram", True, "Free the WebUI's VRAM before a job", "The WebUI's model leaves the graphics card "
            "during a job, and is back for the next image that you generate."),
)  # fmt: skip


def make_fields(host: Host, model: str | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a MakeRequest: those of ``values``; where one is None or left out, what host and settings say."""
    given = {"key_format": host.option("i2l_key_format"), "host": host.name or None, "model": model}
    given |= {key: value for key, value in values.items() if value is not None}
    return given | ({"key_format": None} if given["key_format"] == AUTOMATIC else {})


class SettingsFile:
    """Settings in a file of our own, for the stand-alone page."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()

    def read(self) -> dict[str, Any]:
        """All settings; the default for each that is missing or not valid."""
        held: Any = None
        with suppress(OSError, ValueError):
            held = json.loads(self.path.read_bytes())
        held = held if isinstance(held, Mapping) else {}
        return {one.key: one.valid_or_default(held.get(one.key, one.default)) for one in SETTINGS}

    def write(self, values: Mapping[str, Any]) -> None:
        """Change these; the others stay. Raises OSError, and then the file is unchanged."""
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic.replace_text(self.path, json.dumps(self.read() | dict(values), indent=2))
