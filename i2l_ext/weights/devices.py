"""What the computing device can do, and in which dtype an encoder is computed on it."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

from i2l_ext.converters.errors import UserError

PRECISION_WORDS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""Torch's name of a dtype -> the user's word for it. The first that the device and the encoder allow is chosen: models
are published in bf16, and every device computes fp32."""


@dataclass(frozen=True)
class Device:
    """What is known of a device. ``kind``: cpu, cuda, xpu or mps. ``capability``: CUDA's compute capability. ``bf16``:
    whether torch has bfloat16 there at all; ``quick_bf16``: whether torch's products of it are quick on a processor."""

    kind: str
    title: str
    capability: tuple[int, int] | None = None
    bf16: bool = True
    quick_bf16: bool = True

    def native(self, dtype: str) -> bool:
        """Whether its hardware computes in ``dtype`` (torch's name). Where it does not, computing is slow, and the
        memory of torch's attention grows with the square of the tokens."""
        if dtype == "bfloat16":
            return self.bf16 and self.quick_bf16 and (self.capability is None or self.capability >= (8, 0))
        return dtype == "float32" or self.kind != "cpu"

    def attends_by_squares(self, dtype: str) -> bool:
        """Whether torch's attention holds a number for every pair of tokens there. On a processor, and in what CUDA has
        of its own, it does not."""
        return self.kind in ("mps", "xpu") or not (self.kind == "cpu" or self.native(dtype))

    def __str__(self) -> str:
        capability = f" (compute capability {self.capability[0]}.{self.capability[1]})" if self.capability else ""
        return f"{self.title}{capability}"


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype by torch's name, and why it was chosen."""

    dtype: str
    why: str

    def __str__(self) -> str:
        return f"{PRECISION_WORDS[self.dtype]}: {self.why}"


def choose_dtype(device: Device, safe: Collection[str], wish: str = "auto") -> DtypeChoice:
    """The dtype in which to compute an encoder. ``safe``: those in which it does not overflow, float32 among them.

    ``wish`` is torch's name of a dtype, or auto. A wish that is not safe, or that the device lacks, counts as auto. A
    wish that is only slow is granted.
    """
    words, against = PRECISION_WORDS, []
    for best in words:
        if best not in safe:
            against.append(f"{words[best]} is not safe for it")
        elif not device.native(best):
            against.append(f"the device has no {words[best]} of its own")
        else:
            break
    auto = DtypeChoice(best, "; ".join(against) or "as published")
    if wish == "auto":
        return auto
    if wish not in safe:
        return DtypeChoice(best, f"{words[wish]} was asked for, but is not safe for it")
    if wish == "bfloat16" and not device.bf16:
        return DtypeChoice(best, f"{words[wish]} was asked for, but the device has none")
    return DtypeChoice(wish, "as asked" if device.native(wish) else "as asked; slow, as the device has none of its own")


def device_facts(name: str) -> Device:
    """What is known of the device that torch calls ``name``."""
    import torch

    kind = name.partition(":")[0]
    if kind == "cuda":
        card = torch.cuda.get_device_properties(name)
        return Device(kind, f"{name}: {card.name}, {card.total_memory / 1e9:.1f} GB", (card.major, card.minor))
    bf16, quick = kind != "mps" or _mps_has_bf16(), kind != "cpu" or _products_of_bf16_are_quick()
    return Device(kind, name, bf16=bf16, quick_bf16=quick)


def devices_here() -> list[str]:
    """Torch's names of all devices of this machine."""
    import torch

    numbered = [(kind, getattr(torch, kind, None)) for kind in ("cuda", "xpu")]
    cards = [f"{kind}:{index}" for kind, module in numbered if module for index in range(module.device_count())]
    return ["cpu", *cards, *["mps"] * torch.backends.mps.is_available()]


def free_memory(name: str) -> int | None:
    """Bytes of a device that can be taken: free ones, and those that torch holds unused. None where that is not known,
    and for the processor, whose memory the system shares out."""
    import torch

    device = torch.device(name)
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type in ("cuda", "xpu"):
        module = getattr(torch, device.type)
        index = module.current_device() if device.index is None else device.index
        return module.mem_get_info(index)[0] + module.memory_reserved(index) - module.memory_allocated(index)
    return None


def _products_of_bf16_are_quick() -> bool:
    """Whether oneDNN takes them. It does so from AVX-512 on; without it torch's own loops take five times as long as
    fp32. Where a build of torch cannot tell, they count as quick, as they did before."""
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True


def _mps_has_bf16() -> bool:
    """It depends on the version of macOS; torch raises where it is missing."""
    import torch

    try:
        torch.zeros(1, dtype=torch.bfloat16, device="mps")
    except (RuntimeError, TypeError):
        return False
    return True


def resolve_device(name: str) -> str:
    """Torch's name of the device for a user's word, such as auto. Raises UserError where there is no such device."""
    import torch

    if name == "auto":
        mps = getattr(torch.backends, "mps", None)
        if torch.cuda.is_available():
            own = os.environ.get("LOCAL_RANK")  # each process of `accelerate launch` has a card of its own
            return "cuda" if own is None else f"cuda:{int(own) % torch.cuda.device_count()}"
        return "mps" if mps and mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    found = [one.partition(":")[0] for one in devices_here()]
    count = {kind: found.count(kind) for kind in ("cpu", "cuda", "xpu", "mps")}
    if kind not in count or (index and not index.isdecimal()):
        raise UserError(f"There is no device {name!r}. There are: cpu, cuda, cuda:0, xpu, mps, auto.", "unknown_choice")
    if int(index or 0) >= count[kind]:
        raise UserError(f"This machine has no {name}. Leave --device out to use what there is.", "unknown_choice")
    return name


def resolve_precision(word: str) -> str:
    """Torch's name of the dtype for a user's word, or auto. Raises UserError for any other word."""
    dtypes = {"auto": "auto", **{word: dtype for dtype, word in PRECISION_WORDS.items()}}
    if word not in dtypes:
        raise UserError(f"There is no precision {word!r}. There are: {', '.join(dtypes)}.", "unknown_choice")
    return dtypes[word]
