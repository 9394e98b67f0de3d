"""Sets the factors of a network that a trainer has built from a LoRA of any rank and key format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.fusing import fuse
from i2l_ext.converters.keys import module_path
from i2l_ext.converters.precision import NOTICED, REFUSED, Losses
from i2l_ext.converters.rank import ROW_NORM, resize

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NetworkModule:
    """One module of the trainer's network: its name there, its factors down [rank, d_in] and up [d_out, rank], and the
    number by which the trainer multiplies their product."""

    name: str
    down: torch.nn.Parameter
    up: torch.nn.Parameter
    scale: float


@dataclass(frozen=True)
class InitReport:
    """What was done: how many modules of the network start from the LoRA and how many stay as the trainer made them
    (``fresh``), how many of the LoRA the network does not have (``unused``), and the ranks of the two. ``lost``: the
    share of the update that fp16 lost, where the network is in it."""

    from_lora: int
    fresh: int
    unused: int
    lora_rank: int
    rank: int
    lost: float = 0.0

    def __str__(self) -> str:
        rank = f"rank {self.lora_rank} -> {self.rank}" if self.lora_rank != self.rank else f"rank {self.rank}"
        parts = [f"{self.from_lora} modules start from the LoRA ({rank})", f"{self.fresh} start fresh"]
        if self.unused:
            parts.append(f"{self.unused} modules of the LoRA are not in this network")
        if self.lost >= NOTICED:
            parts.append(f"fp16 loses {self.lost:.1%} of the update")
        return "i2l: " + ", ".join(parts)


def initialize_network(modules: Sequence[NetworkModule], source: Lora | Path | str, *, seed: int = 0) -> InitReport:
    """Set every module that the LoRA has too, at the rank of the network's module. The others stay as they are.

    Where the network has q, k and v as one layer, as the first implementation of FLUX.2 has, they start from all three.
    The LoRA is resized exactly; where the rank grows, the further rows are drawn with ``seed`` and can learn. These get
    the norm of those that the trainer has drawn; the others are balanced as `i2l export` does it. The up factor is
    divided by the trainer's scale, so the update is the LoRA's whatever the trainer's alpha is. Parameters keep their
    identity, dtype and device.

    Raises UserError where no module matches, so that a run without a start cannot be taken for one with a start, where
    a shape differs, where a scale is 0 or not finite, and where parameters in fp16 lose more than 1 % of the update.
    """
    import torch

    lora = source if isinstance(source, Lora) else Lora.read(source)
    arch = lora.arch
    if fused := any(not module_path(one.name, arch) and module_path(one.name, arch, fused=True) for one in modules):
        lora = fuse(lora)
    named = [(module_path(module.name, arch, fused=fused), module) for module in modules]
    found = {path: module for path, module in named if path is not None and path in lora.specs}
    if not found:
        first = modules[0].name if modules else "none"
        raise UserError(f"The LoRA is of {lora.arch.title}; none of the network's modules is (first: {first}).")
    for path, module in found.items():
        d_out, d_in = lora.arch.modules[path].shape
        if module.down.shape[1] != d_in or module.up.shape[0] != d_out:
            raise UserError(
                f"{module.name}: maps {module.down.shape[1]} to {module.up.shape[0]}, the LoRA {d_in} to {d_out}."
            )
        if not module.scale or not isfinite(module.scale):
            raise UserError(
                f"{module.name}: the network's scale is {module.scale:g}, so the LoRA would have no effect."
            )
    ranks = {path: module.down.shape[0] for path, module in found.items()}
    subset = Lora(lora.arch, {path: lora.specs[path] for path in found}, lora.load)
    resized = resize(subset, ranks, seed=seed, row_norms=lambda path: _row_norm(found[path].down), equal=True)
    losses = Losses()
    with torch.no_grad():
        for path, module in found.items():
            down, up = resized[path]
            pair = down, up / module.scale
            for parameter, factor in zip((module.down, module.up), pair, strict=True):
                parameter.copy_(factor)
            if torch.float16 in (module.down.dtype, module.up.dtype):
                losses.measure(path, pair, (module.down.cpu(), module.up.cpu()))
    if losses.lost() > REFUSED:
        raise UserError(
            f"The network is in fp16, which has too few exponents for this LoRA: {losses.lost():.1%} of its update "
            "would be lost. Train the network in bf16 or fp32."
        )
    return InitReport(
        len(found), len(modules) - len(found), len(lora) - len(found), lora.rank, max(ranks.values()), losses.lost()
    )


def _row_norm(down: torch.Tensor) -> float:
    """The norm that the rows of a fresh down factor have on average; the usual one where it is not a fresh one's."""
    norm = float(down.detach().float().square().sum(dim=1).mean().sqrt())
    return norm if isfinite(norm) and norm > 0 else ROW_NORM


def kohya_modules(modules: Iterable[Any]) -> list[NetworkModule]:
    """The modules of a network built as kohya's are: with ``lora_name``, ``lora_down``, ``lora_up`` and ``scale``."""
    return [
        NetworkModule(
            module.lora_name.replace("$$", "."), module.lora_down.weight, module.lora_up.weight, float(module.scale)
        )
        for module in modules
        if hasattr(getattr(module, "lora_down", None), "weight")
    ]
