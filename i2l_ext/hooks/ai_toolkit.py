"""A network of ai-toolkit, started from a LoRA: for an extension of its own; `i2l export` needs none.

class Trainer(SDTrainer):
    def hook_before_train_loop(self):
        super().hook_before_train_loop()
        print(i2l_ext.hooks.ai_toolkit.initialize(self.network, "my_style.safetensors"))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters import Lora
from i2l_ext.hooks import initialize as hook
from i2l_ext.hooks.initialize import Report

if TYPE_CHECKING:
    import torch


def initialize(network: torch.nn.Module, source: Lora | Path | str, *, seed: int = 0) -> Report:
    """Set the network's factors from a LoRA, at the network's own rank. See `hooks.initialize`."""
    return hook.initialize(hook.kohya_places(network.unet_loras), source, seed=seed)
