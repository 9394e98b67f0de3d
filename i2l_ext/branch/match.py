"""Which layers of a model a LoRA's modules are, by name and shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.spellings import layer_names

if TYPE_CHECKING:
    from torch import nn

LEAST = 0.5
"""The share of a LoRA's modules that a model must have. Below it is taken for another model's, as Forge Neo does."""


@dataclass(frozen=True)
class LayerPart:
    """One module of a LoRA in a layer: its ``path`` in the LoRA, and its ``rows`` (start, end) of the layer's output;
    None where it is the whole layer."""

    path: str
    rows: tuple[int, int] | None


@dataclass(frozen=True)
class LoraMatch:
    """The layers of a model that a LoRA changes: name in the model -> the LoRA's modules in it, of which a fused layer
    has several. ``missing``: the LoRA's modules that the model has not."""

    layers: dict[str, tuple[LayerPart, ...]]
    missing: tuple[str, ...]

    @property
    def modules(self) -> int:
        """How many of the LoRA's modules the model has."""
        return sum(map(len, self.layers.values()))


def match_lora(model: nn.Module, lora: Lora, name: str = "The LoRA") -> LoraMatch:
    """The layers of ``model`` that ``lora`` changes. Names are those of diffusers, of the first implementation, and of
    programs that fuse layers. ``name``: of the LoRA, for messages.

    Raises UserError where less than half of the LoRA's modules are in the model, and where a shape differs.
    """
    known = layer_names(lora.arch.id)
    layers: dict[str, tuple[LayerPart, ...]] = {}
    found: set[str] = set()
    for layer_name, layer in model.named_modules():
        paths = known.get(plain_name(layer_name), ())
        if found.isdisjoint(paths) and (parts := _parts(lora, paths)):
            found.update(part.path for part in parts)
            layers[layer_name] = parts
            _check_shape(layer, layer_name, lora, paths, name)
    missing = tuple(path for path in lora if path not in found)
    if len(found) < LEAST * len(lora):
        raise UserError(
            f"{name}: a LoRA of {lora.arch.title}, of which the loaded model has {len(found)} of {len(lora)} modules. "
            "Load the base model that it was made for."
        )
    return LoraMatch(layers, missing)


def plain_name(layer_name: str) -> str:
    """A layer's name without what torch.compile puts into it."""
    return layer_name.replace("_orig_mod.", "")


def shape_of(layer: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer, quantized or not; None where only its output will tell."""
    d_out, d_in = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if isinstance(d_out, int) and isinstance(d_in, int):
        return d_out, d_in
    weight: Any = getattr(layer, "weight", None)
    if getattr(weight, "ndim", 0) == 2 and weight.is_floating_point():
        return weight.shape[0], weight.shape[1]
    return None


def _parts(lora: Lora, paths: tuple[str, ...]) -> tuple[LayerPart, ...]:
    """The LoRA's modules among the ``paths`` that a layer holds."""
    parts, start = [], 0
    for path in paths:
        end = start + lora.arch.modules[path].shape[0]
        if path in lora.specs:
            parts.append(LayerPart(path, (start, end) if len(paths) > 1 else None))
        start = end
    return tuple(parts)


def _check_shape(layer: nn.Module, layer_name: str, lora: Lora, paths: tuple[str, ...], name: str) -> None:
    shape = shape_of(layer)
    expected = sum(lora.arch.modules[path].shape[0] for path in paths), lora.arch.modules[paths[0]].shape[1]
    if shape is not None and shape != expected:
        raise UserError(
            f"{name}: {layer_name} of the loaded model is {list(shape)}, in {lora.arch.title} "
            f"{list(expected)}. Load the base model that the LoRA was made for."
        )
