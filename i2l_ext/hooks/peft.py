"""A model with a PEFT adapter, such as flymyai-lora-trainer's and diffusers', started from a LoRA.

transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=[...]))
print(i2l_ext.hooks.peft.initialize(transformer, "my_style.safetensors"))
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters import Lora, UserError
from i2l_ext.hooks.network import InitReport, NetworkModule, initialize_network

if TYPE_CHECKING:
    import torch


def initialize(
    model: torch.nn.Module, source: Lora | Path | str, adapter_name: str = "default", *, seed: int = 0
) -> InitReport:
    """Set the adapter's factors from a LoRA, at the adapter's own rank and scale.

    Raises UserError where the model has no such adapter, where it is a DoRA, and as `initialize_network`.
    """
    modules = list(_adapter_modules(model, adapter_name))
    if not modules:
        raise UserError(f"The model has no LoRA adapter {adapter_name!r}: call add_adapter first.")
    return initialize_network(modules, source, seed=seed)


def _adapter_modules(model: torch.nn.Module, adapter_name: str) -> Iterator[NetworkModule]:
    for name, module in model.named_modules():
        downs = getattr(module, "lora_A", None)
        if downs is None or not hasattr(downs, "keys") or adapter_name not in downs:
            continue
        if adapter_name in (getattr(module, "lora_magnitude_vector", None) or ()):
            raise UserError(f"{name}: the adapter is a DoRA; only a plain LoRA can start from one.")
        up = module.lora_B[adapter_name]
        yield NetworkModule(name, downs[adapter_name].weight, up.weight, float(module.scaling[adapter_name]))
