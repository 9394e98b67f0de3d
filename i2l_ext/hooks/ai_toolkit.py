"""A run of ai-toolkit, started from a LoRA. For extensions of ai-toolkit; the files of `i2l export` need no code.

class Trainer(SDTrainer):
    def hook_add_extra_train_params(self, params):
        i2l_ext.hooks.ai_toolkit.initialize(self, "my_style.safetensors")
        return super().hook_add_extra_train_params(params)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from i2l_ext.converters import Lora, UserError
from i2l_ext.hooks.network import InitReport, initialize_network, kohya_modules


def initialize(trainer: Any, source: Lora | Path | str, *, seed: int = 0) -> InitReport | None:
    """Set the factors of the trainer's network from a LoRA, at the network's own rank, and say so in one line.

    ``trainer``: ai-toolkit's, a BaseSDTrainProcess that has built its network. A run that goes on from a checkpoint of
    its own is left as it is: None. A moving average (EMA) that is there already begins anew with the LoRA.

    Raises UserError where it is not a trainer with a network, and as `initialize_network`.
    """
    network = getattr(trainer, "network", None)
    if network is None or not hasattr(trainer, "get_latest_save_path"):
        raise UserError("Give the trainer (self), not its network: only the trainer knows whether a run is resumed.")
    checkpoint = _checkpoint(trainer)
    if checkpoint is not None:
        print(f"i2l: the run goes on from {checkpoint}; the LoRA is not loaded", flush=True)
        return None
    report = initialize_network(kohya_modules(network.unet_loras), source, seed=seed)
    if trainer.ema is not None:
        trainer.setup_ema()
    print(report, flush=True)
    return report


def _checkpoint(trainer: Any) -> str | None:
    """What the trainer resumes from. It also finds ``pretrained_lora_path``, which is a start and no checkpoint."""
    name = trainer.name + ("_LoRA" if trainer.named_lora else "")
    found = trainer.get_latest_save_path(name)
    return None if found == trainer.network_config.pretrained_lora_path else found
