"""A model with a PEFT adapter, such as flymyai-lora-trainer's and diffusers', started from a LoRA.

transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=[...]))
print(i2l_ext.hooks.peft.initialize(transformer, "my_style.safetensors"))

Call it before a checkpoint is loaded: a run that is resumed then keeps its training.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters import Lora, UserError
from i2l_ext.hooks.network import InitReport, NetworkModule, initialize_network

if TYPE_CHECKING:
    import torch

PLAIN = (True, False, "gaussian")
"""Values of ``init_lora_weights`` that leave the base model as it is. PiSSA, OLoRA, CorDA, LoftQ and others have taken
from its weights what the adapter then holds: other factors would damage it. Of one that is new, nobody knows."""


def initialize(
    model: torch.nn.Module, source: Lora | Path | str, adapter_name: str = "default", *, seed: int = 0
) -> InitReport:
    """Set the adapter's factors from a LoRA, at the adapter's own rank and scale.

    Raises UserError where the model has no such adapter, where it is not a plain LoRA (a DoRA, an AdaLoRA) or does not
    start as one (PiSSA), and as `initialize_network`.
    """
    configs = (getattr(module, "peft_config", None) or {} for module in model.modules())
    config = next((found[adapter_name] for found in configs if adapter_name in found), None)
    if config is None:
        raise UserError(f"The model has no LoRA adapter {adapter_name!r}: call add_adapter first.")
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise UserError(f"The adapter {adapter_name!r} is a {kind}; only a plain LoRA can start from one.")
    if config.init_lora_weights not in PLAIN:
        raise UserError(
            f"The adapter {adapter_name!r} starts with init_lora_weights={config.init_lora_weights!r}, which may have "
            f"changed the base model's weights. Load that again and use init_lora_weights=True."
        )
    modules = list(_adapter_modules(model, adapter_name))
    return initialize_network(modules, source, seed=seed)


def _adapter_modules(model: torch.nn.Module, adapter_name: str) -> Iterator[NetworkModule]:
    for name, module in model.named_modules():
        downs = getattr(module, "lora_A", None)
        if downs is None or not hasattr(downs, "keys") or adapter_name not in downs:
            continue
        if adapter_name in (getattr(module, "lora_magnitude_vector", None) or ()):
            raise UserError(f"{name}: the adapter is a DoRA; only a plain LoRA can start from one.")
        if adapter_name in (getattr(module, "lora_variant", None) or ()):
            variant = type(module.lora_variant[adapter_name]).__name__.removesuffix("LinearVariant")
            raise UserError(f"{name}: the adapter is a {variant}; only a plain LoRA can start from one.")
        up = module.lora_B[adapter_name]
        yield NetworkModule(name, downs[adapter_name].weight, up.weight, float(module.scaling[adapter_name]))
