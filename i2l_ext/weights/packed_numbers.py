"""Numbers to packed ones, and back, on the processor."""

from __future__ import annotations

import torch
from torch import Tensor

from i2l_ext.converters.files import TORCH_NAMES
from i2l_ext.weights.packing import PACK_FORMATS, SCALE_BYTES

CHUNK = 1 << 19
"""Numbers that get their values at a time: few enough to stay in a processor's cache between two steps, many enough
that a step takes longer than its call."""

_BITS = torch.tensor([[byte >> bit & 1 for bit in range(8)] for byte in range(256)], dtype=torch.int8)
_BITS = _BITS.view(torch.int64).view(-1)
"""The eight bits of each byte, the lowest first, each as a byte, and the eight together as one number to look up."""

_HALVES = {torch.float8_e4m3fn: (1 << 7, ~0x4000, 256.0), torch.float8_e5m2: (1 << 8, ~0, 1.0)}
"""A float of one byte is a float16 once its bits stand further up: how far, with the copies of its sign taken out. Then
its exponent lacks a factor. Ten times as fast as torch's conversion."""


def pack(numbers: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """Floats [n], whole groups, to the nearest packed ones: one byte each [n], scales [n / group] in bfloat16, and the
    low bits, eight in a byte: [n / 8], or [0] where the format has none.

    Raises ValueError for NaN and infinity.
    """
    target = PACK_FORMATS[form]
    groups = numbers.float().view(-1, target.group)
    largest = groups.abs().amax(1)
    if not torch.isfinite(largest).all():
        raise ValueError("NaN or infinity")
    scales = (largest / target.largest).bfloat16()
    wide = scales.float()
    shares = (groups / wide.where(wide > 0, 1)[:, None]).clamp_(-target.largest, target.largest).view(-1)
    low = torch.empty(0, dtype=torch.uint8)
    if target.dtype == "I8":
        shares = shares.round_()
    if target.bits > 8:
        upper = (shares / 2).floor_()
        low = (shares.sub_(upper, alpha=2).view(-1, 8) @ 2.0 ** torch.arange(8)).to(torch.uint8)
        shares = upper
    return shares.to(getattr(torch, TORCH_NAMES[target.dtype])), scales, low


def unpack(packed: Tensor, scales: Tensor | None, group: int, first: int, out: Tensor) -> None:
    """Put packed numbers [n], of which the first is number ``first`` of its tensor, times their scales into ``out``
    [n]. ``scales``: those of the whole tensor, for ``group`` numbers each, as they are in the file; None for one."""
    low = None
    if scales is None:
        scales, group = torch.ones(1), first + len(packed)
    elif scales.dtype == torch.uint8:
        scales, low = _split(scales, group)
    scales = scales.view(-1)
    wide = out if out.dtype == torch.float32 else torch.empty(min(CHUNK, len(packed)))
    done = 0
    while done < len(packed):
        at, count = first + done, min(CHUNK, len(packed) - done)
        rest = group - at % group
        count = min(count, rest) if rest < group or count < group else count - count % group
        own = slice(at // group, -(-(at + count) // group))
        found, target = packed[done : done + count], out[done : done + count]
        values = target if wide is out else wide[:count]
        if low is not None:
            bits = low[own.start * group // 8 : own.stop * group // 8]
            bits = _BITS.index_select(0, bits.int()).view(torch.int8)[at % group :][:count]
            found = found.short().mul_(2).add_(bits)
        factor = _widen(found, values)
        values.view(-1, min(group, count)).mul_((scales[own].float() * factor)[:, None])
        if values is not target:  # a product is rounded once
            target.copy_(values)
        done += count


def _split(scales: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The scales and the low bits of one tensor."""
    end = len(scales) // (SCALE_BYTES + group // 8) * SCALE_BYTES
    return scales[:end].view(torch.bfloat16), scales[end:]


def _widen(packed: Tensor, values: Tensor) -> float:
    """Put one-byte numbers into ``values``, in float32, up to the factor that is returned."""
    if packed.dtype not in _HALVES:
        values.copy_(packed)
        return 1.0
    shift, mask, factor = _HALVES[packed.dtype]
    bits = packed.view(torch.int8)
    if packed.dtype == torch.float8_e4m3fn and int((bits & 127).amax()) == 127:  # NaN, which is no float16's NaN
        values.copy_(packed)
        return 1.0
    values.copy_(bits.short().mul_(shift).bitwise_and_(mask).view(torch.float16))
    return factor
