"""A network of ai-toolkit, started from a LoRA. For extensions of ai-toolkit; the files of `i2l export` need no code.

class Trainer(SDTrainer):
    def hook_before_train_loop(self):
        super().hook_before_train_loop()
        print(i2l_ext.hooks.ai_toolkit.initialize(self.network, "my_style.safetensors"))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters import Lora
from i2l_ext.hooks.network import InitReport, initialize_network, kohya_modules

if TYPE_CHECKING:
    import torch


def initialize(network: torch.nn.Module, source: Lora | Path | str, *, seed: int = 0) -> InitReport:
    """Set the network's factors from a LoRA, at the network's own rank. Raises UserError as `initialize_network`."""
    return initialize_network(kohya_modules(network.unet_loras), source, seed=seed)
