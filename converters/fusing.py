"""A LoRA in the layers of a model's first implementation, which has q, k and v of some attentions as one layer."""

from __future__ import annotations

from .lora import Lora, fused_factors
from .spellings import NativeLayer, native_layers


def fuse(lora: Lora) -> Lora:
    """The same update, exactly, in the layers of `Architecture.fused`. Where modules of different down factors are one
    layer there, its rank is the sum of theirs."""
    native = native_layers(lora.arch.id)
    layers = (native.get(path, NativeLayer(path, (path,))) for path in lora)
    made = {layer.name: fused_factors(lora, layer.paths) for layer in dict.fromkeys(layers)}
    return Lora(
        lora.arch.fused, {name: spec for name, (spec, _) in made.items()}, lambda name: made[name][1](), lora.metadata
    )
