"""Any model with a PEFT adapter, flymyai-lora-trainer's and diffusers' among them, started from a LoRA.

transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=[...]))
print(i2l_ext.hooks.peft.initialize(transformer, "my_style.safetensors"))
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters import Lora, UserError
from i2l_ext.hooks import initialize as hook
from i2l_ext.hooks.initialize import Place, Report

if TYPE_CHECKING:
    import torch


def initialize(
    model: torch.nn.Module, source: Lora | Path | str, adapter_name: str = "default", *, seed: int = 0
) -> Report:
    """Set the adapter's factors from a LoRA, at the adapter's own rank and scale. See `hooks.initialize`.

    Raises UserError where the model has no such adapter, where it is a DoRA, or where nothing of the LoRA fits.
    """
    places = list(_places(model, adapter_name))
    if not places:
        raise UserError(f"The model has no LoRA adapter {adapter_name!r}: call add_adapter first.")
    return hook.initialize(places, source, seed=seed)


def _places(model: torch.nn.Module, adapter_name: str) -> Iterator[Place]:
    for name, module in model.named_modules():
        downs = getattr(module, "lora_A", None)
        if downs is None or not hasattr(downs, "keys") or adapter_name not in downs:
            continue
        if adapter_name in (getattr(module, "lora_magnitude_vector", None) or ()):
            raise UserError(f"{name}: the adapter is a DoRA; only a plain LoRA can start from one.")
        up = module.lora_B[adapter_name]
        yield Place(name, downs[adapter_name].weight, up.weight, float(module.scaling[adapter_name]))
