"""The settings: one table, shown on the WebUI's settings page, or stand-alone in a pane of the tab."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from i2l_ext.converters import atomic
from i2l_ext.converters.dialects import DEFAULT, DIALECTS
from i2l_ext.requests import PRECISIONS

DTYPES = {"as made": None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}
HUBS = {"Hugging Face": "huggingface", "ModelScope": "modelscope"}


@dataclass(frozen=True)
class Option:
    """``choices``: for a drop-down list; () for a text or, by the default's type, a tick box or a number. ``folder``:
    a path, which alone is shown to and taken from those only who sit at this machine."""

    key: str
    default: Any
    label: str
    tip: str
    choices: Sequence[str] = ()
    folder: bool = False

    def sound(self, value: Any) -> Any:
        """The value, or the default where the value is not of its kind."""
        if self.choices:
            return value if value in self.choices else self.default
        if isinstance(self.default, bool) or not isinstance(self.default, (int, float)):
            return value if isinstance(value, type(self.default)) else self.default
        return value if isinstance(value, (int, float)) and value >= 0 else self.default


OPTIONS = (
    Option("i2l_models_folder", "", "Models folder", "Where downloaded weights go. Empty: models/i2l of the WebUI, or "
           "without one a folder of the system's.", folder=True),
    Option("i2l_lora_folder", "", "LoRA folder", "Where LoRAs are written. Empty: that of the WebUI.", folder=True),
    Option("i2l_device", "auto", "Device", "Where the engine computes: auto takes the graphics card if there is one.",
           ("auto", "cpu", "cuda", "cuda:0", "cuda:1", "mps")),
    Option("i2l_precision", "auto", "Precision", "Of the encoders. auto: what the device computes natively and each "
           "encoder bears; the bug report says which.", PRECISIONS),
    Option("i2l_memory", "", "Memory bound", "Such as 6GB: the engine keeps within it, and is slower. Empty: no bound."),  # noqa: E501
    Option("i2l_model", "", "Default model", "The one that is chosen at first. Empty: the first that is downloaded, "
           "else mini."),
    Option("i2l_dialect", DEFAULT, "Default key names", "What is chosen at first under Advanced.", tuple(DIALECTS)),
    Option("i2l_dtype", "as made", "Default number format", "What is chosen at first under Advanced.", tuple(DTYPES)),
    Option("i2l_subfolder", "", "Default sub-folder", "Of the LoRA folder."),
    Option("i2l_cache_gb", 2, "Cache size in GB", "Of what the models saw in pictures: making a LoRA of the same "
           "pictures again is fast. 0: keep nothing."),
    Option("i2l_free_vram", True, "Free the WebUI's VRAM before a job", "The WebUI's model leaves the graphics card, "
           "and comes back with the next picture that you generate."),
)  # fmt: skip


class Stored:
    """Settings in a file of our own, for the stand-alone page."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()

    def read(self) -> dict[str, Any]:
        held: Any = None
        with suppress(OSError, ValueError):
            held = json.loads(self.path.read_bytes())
        held = held if isinstance(held, Mapping) else {}
        return {option.key: option.sound(held.get(option.key, option.default)) for option in OPTIONS}

    def write(self, values: Mapping[str, Any]) -> None:
        """Change these; the others stay. Raises OSError, and then the file is as it was."""
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic.replace_text(self.path, json.dumps(self.read() | dict(values), indent=2))
