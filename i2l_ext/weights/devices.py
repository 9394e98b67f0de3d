"""What the device that computes can do, and in which dtype an encoder is computed on it."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

from i2l_ext.converters.errors import UserError

WORDS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""By torch's name of a dtype, the word for it. The first that the device and the encoder allow is taken: bf16 is what
the weights are published in, and everything can do fp32."""

PRECISIONS = ("auto", *WORDS.values())
"""What a user may wish for."""


@dataclass(frozen=True)
class Device:
    """Facts of a device. ``kind``: cpu, cuda or mps. ``capability``: CUDA's compute capability. ``bf16``: whether torch
    has bfloat16 there at all."""

    kind: str
    title: str
    capability: tuple[int, int] | None = None
    bf16: bool = True

    def native(self, dtype: str) -> bool:
        """Whether it computes in ``dtype`` (torch's name) itself. Where it does not, that is slow, and torch's
        attention takes memory by the square of the tokens."""
        if dtype == "bfloat16":
            return self.bf16 and (self.capability is None or self.capability >= (8, 0))
        return dtype == "float32" or self.kind != "cpu"

    def __str__(self) -> str:
        capability = f" (compute capability {self.capability[0]}.{self.capability[1]})" if self.capability else ""
        return f"{self.title}{capability}"


@dataclass(frozen=True)
class Choice:
    """A dtype by torch's name, and why it was chosen."""

    dtype: str
    why: str

    def __str__(self) -> str:
        return f"{WORDS[self.dtype]}: {self.why}"


def choose_dtype(device: Device, safe: Collection[str], wish: str = "auto") -> Choice:
    """The dtype for an encoder to which those in ``safe`` do no harm, float32 among them.

    ``wish`` is torch's name of a dtype, or auto. A wish that would do harm, or that the device cannot fulfil, is
    answered as auto; one that is merely slow is granted.
    """
    against = []
    for best in WORDS:
        if best not in safe:
            against.append(f"{WORDS[best]} is not safe for it")
        elif not device.native(best):
            against.append(f"the device has no {WORDS[best]} of its own")
        else:
            break
    auto = Choice(best, "; ".join(against) or "as published")
    if wish == "auto":
        return auto
    if wish not in safe:
        return Choice(best, f"{WORDS[wish]} was asked for, but is not safe for it")
    if wish == "bfloat16" and not device.bf16:
        return Choice(best, f"{WORDS[wish]} was asked for, but the device has none")
    return Choice(wish, "as asked" if device.native(wish) else "as asked; slow, as the device has none of its own")


def device_facts(name: str) -> Device:
    """Facts of the device that torch calls ``name``."""
    import torch

    kind = name.partition(":")[0]
    if kind == "cuda":
        card = torch.cuda.get_device_properties(name)
        return Device(kind, f"{name}: {card.name}, {card.total_memory / 1e9:.1f} GB", (card.major, card.minor))
    return Device(kind, kind, bf16=kind != "mps" or _mps_has_bf16())


def _mps_has_bf16() -> bool:
    """As torch says when it is asked for some: it depends on the version of macOS."""
    import torch

    try:
        torch.zeros(1, dtype=torch.bfloat16, device="mps")
    except (RuntimeError, TypeError):
        return False
    return True


def resolve_device(name: str) -> str:
    """The torch device for a user's word. Raises UserError where there is no such device."""
    import torch

    if name == "auto":
        mps = getattr(torch.backends, "mps", None)
        if torch.cuda.is_available():
            own = os.environ.get("LOCAL_RANK")  # one of several processes of `accelerate launch`: to each its card
            return "cuda" if own is None else f"cuda:{int(own) % torch.cuda.device_count()}"
        return "mps" if mps and mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": 1 if torch.backends.mps.is_available() else 0}
    if kind not in count or (index and not index.isdecimal()):
        raise UserError(f"There is no device {name!r}. There are: cpu, cuda, cuda:0, mps and auto.")
    if int(index or 0) >= count[kind]:
        raise UserError(f"This machine has no {name}. Leave --device out to use what there is.")
    return name


def resolve_precision(name: str) -> str:
    """What a user wishes the encoders' dtype to be: torch's name of one, or auto. Raises UserError for any other."""
    if name not in PRECISIONS:
        raise UserError(f"There is no precision {name!r}. There are: {', '.join(PRECISIONS)}.")
    return next((dtype for dtype, word in WORDS.items() if word == name), name)
