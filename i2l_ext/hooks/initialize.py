"""Setting the factors of a network that a trainer has built, from a LoRA of any rank and dialect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.dialects import module_path
from i2l_ext.converters.rank import resize

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """One module of the trainer's network: its name there, its factors (down [rank, d_in], up [d_out, rank]), and the
    number that the trainer multiplies their product with."""

    name: str
    down: torch.nn.Parameter
    up: torch.nn.Parameter
    scale: float


@dataclass(frozen=True)
class Report:
    """What was done: modules set and left fresh, modules of the LoRA without a place, and the ranks."""

    set: int
    fresh: int
    without_place: int
    rank_from: int
    rank: int

    def __str__(self) -> str:
        grown = f"rank {self.rank_from} -> {self.rank}" if self.rank_from != self.rank else f"rank {self.rank}"
        parts = [f"{self.set} modules start from the LoRA ({grown})", f"{self.fresh} start fresh"]
        if self.without_place:
            parts.append(f"{self.without_place} of the LoRA have no place here")
        return "i2l: " + ", ".join(parts)


def open_lora(source: Lora | Path | str) -> Lora:
    """A LoRA as it is, or from a file."""
    return source if isinstance(source, Lora) else Lora.read(source)


def initialize(places: Sequence[Place], source: Lora | Path | str, *, seed: int = 0) -> Report:
    """Set every place that the LoRA has a module for, at the place's own rank; leave the others as they are.

    The rank is reset exactly; where it grows, the further rows are fresh and can learn. The trainer's scale is divided
    out, so that the update is the LoRA's whatever the trainer's alpha says. Parameters keep their identity, dtype and
    device. Raises UserError where nothing fits: a run that starts from nothing should not look like one that does not.
    """
    import torch

    lora = open_lora(source)
    named = [(module_path(place.name, lora.arch), place) for place in places]
    found = {path: place for path, place in named if path is not None and path in lora.specs}
    if not found:
        seen = places[0].name if places else "none"
        raise UserError(f"The LoRA is of {lora.arch.title}; none of the network's modules is (first: {seen}).")
    for path, place in found.items():
        d_out, d_in = lora.arch.modules[path].shape
        if place.down.shape[1] != d_in or place.up.shape[0] != d_out:
            raise UserError(
                f"{place.name}: maps {place.down.shape[1]} to {place.up.shape[0]}, the LoRA {d_in} to {d_out}."
            )
        if not place.scale:
            raise UserError(f"{place.name}: the network's scale is 0, so nothing of a LoRA would act.")
    ranks = {path: place.down.shape[0] for path, place in found.items()}
    part = Lora(lora.arch, {path: lora.specs[path] for path in found}, lora.load)
    resized = resize(part, ranks, seed=seed)
    with torch.no_grad():
        for path, place in found.items():
            down, up = resized[path]
            place.down.copy_(down)
            place.up.copy_(up / place.scale)
    return Report(len(found), len(places) - len(found), len(lora) - len(found), lora.rank, max(ranks.values()))


def kohya_places(modules: Iterable[Any]) -> list[Place]:
    """The places of a network of kohya's plan: modules with ``lora_name``, ``lora_down``, ``lora_up``, ``scale``."""
    return [
        Place(module.lora_name.replace("$$", "."), module.lora_down.weight, module.lora_up.weight, float(module.scale))
        for module in modules
        if hasattr(getattr(module, "lora_down", None), "weight")
    ]
