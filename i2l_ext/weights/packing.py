"""Packed model files: which tensors are scales, and for what; the formats we write.

A packed tensor ``KEY`` has its scales in ``KEY_scale``: number i of the tensor, in the order of the file, is its byte
times scale i // group. A format of nine bits has the lowest bit of each number behind the scales, eight in a byte.
Files of other programs have one scale for a tensor, a row or a part of a row; they are read too. Importing this does
not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.headers import BYTES, Header, TensorInfo

SCALE_BYTES = 2
"""Our scales are bfloat16."""

METADATA = "i2l.packed"

VERSION = 2
"""Of the note in a file. Version 1 had groups of 16; it is read too."""


@dataclass(frozen=True)
class PackFormat:
    """``dtype``: the safetensors format's name for a number's upper eight ``bits``. ``group``: numbers that share a
    scale. ``largest``: the number that the largest of a group becomes."""

    dtype: str
    bits: int
    group: int
    largest: float

    def scales(self, numbers: int) -> tuple[str, int]:
        """The dtype and the length of the scales' tensor of so many numbers: with low bits it holds bytes."""
        count, low = numbers // self.group, numbers * (self.bits - 8) // 8
        return ("U8", SCALE_BYTES * count + low) if self.bits > 8 else ("BF16", count)


PACK_FORMATS = {
    "int9": PackFormat("I8", 9, 32, 255.0),
    "int8": PackFormat("I8", 8, 64, 127.0),
    "fp8": PackFormat("F8_E4M3", 8, 64, 448.0),
}
"""By the user's word; the most exact one first, which is the default. On weights of normal distribution int9 is 0.27 %
off, int8 0.60 %, fp8 2.5 %. With groups of 64, int9 would be 0.30 % off: as much as bf16 arithmetic moves DINOv3's
class token, and no longer less (benchmarks/packed.py)."""

_READ = (*PACK_FORMATS.values(), *(replace(form, group=16) for form in PACK_FORMATS.values() if form.bits == 8))
"""What we have written, version 1 among it."""

_ONE_BYTE = ("I8", "F8_E4M3", "F8_E5M2")

_MARKS = ("scaled_fp8", ".comfy_quant", ".input_scale", ".scale_input")
"""Ends of keys that ComfyUI adds to such a file, and that are no weights."""


def scale_key(key: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The key of a tensor's scales; None where it has none."""
    if key not in tensors or tensors[key].dtype not in _ONE_BYTE:
        return None
    names = [f"{key}_scale"] + ([f"{key[:-6]}scale_weight"] if key.endswith(".weight") else [])
    return next((name for name in names if name in tensors), None)


def weights_of(header: Header) -> dict[str, TensorInfo]:
    """The tensors of a file without scales and marks: those that an unpacked file has, by key."""
    tensors = header.tensors
    if not any(info.dtype in _ONE_BYTE for info in tensors.values()):
        return tensors
    scales = {scale_key(key, tensors) for key in tensors}
    return {key: info for key, info in tensors.items() if key not in scales and not key.endswith(_MARKS)}


def group_size(name: str, key: str, tensors: Mapping[str, TensorInfo]) -> int:
    """How many neighbours of a tensor share a scale; 0 where it has none and needs none.

    Raises UserError, with the file's ``name``, where scales are missing, are no floats (or ours with low bits), or are
    not one for the tensor, for each row, for equal parts of rows, or for groups as we write them.
    """
    weight, scaled_by = tensors[key], scale_key(key, tensors)
    if scaled_by is None:
        if weight.dtype == "I8":
            raise UserError(f"{name}: the tensor {key!r} holds I8, not floats, and its scales are missing.")
        return 0
    scales = tensors[scaled_by]
    numbers, count = prod(weight.shape), prod(scales.shape)
    rows = weight.shape[0] if weight.shape else 1
    whole = count > 0 and numbers % count == 0
    by_row = scales.shape[:1] == (rows,) and count % rows == 0 and scales.shape[1:].count(1) >= len(scales.shape) - 2
    if scales.dtype in ("F32", "BF16", "F16") and whole and (count == 1 or by_row):
        return numbers // count
    found = (scales.dtype, *scales.shape)
    for form in _READ:
        if form.dtype == weight.dtype and numbers % form.group == 0 and form.scales(numbers) == found:
            return form.group
    raise UserError(f"{name}: the scales of {key!r} ({scales.dtype} {list(scales.shape)}) do not fit its shape "
                    f"{list(weight.shape)}. Pack or download the file again.")  # fmt: skip


@dataclass(frozen=True)
class PackNote:
    """What a file that we packed says of itself: of which checkpoint's file it was made, and that file's sha256."""

    checkpoint: str
    file: str
    form: str
    origin: str
    version: int = VERSION

    @property
    def text(self) -> str:
        return json.dumps(asdict(self))


def pack_note(path: Path, header: Header) -> PackNote | None:
    """The note of a file; None where it was not packed by us. Raises UserError for one that cannot be understood."""
    text = header.metadata.get(METADATA)
    if text is None:
        return None
    try:
        note = PackNote(**json.loads(text))
        known = note.version in (1, VERSION) and note.form in PACK_FORMATS
        known &= all(isinstance(one, str) for one in (note.checkpoint, note.file, note.origin))
    except (TypeError, ValueError, RecursionError):
        known = False
    if not known:
        raise UserError(f"{path.name}: was packed in a way that this version does not know. Pack or download it again.")
    return note


def packed_name(name: str, form: str) -> str:
    """What the packed form of a model file is called."""
    return f"{name.removesuffix('.safetensors')}.{form}.safetensors"


def is_packed(info: TensorInfo, form: str) -> bool:
    """Whether a tensor of an unpacked file is packed: any that is a matrix and fills whole groups."""
    wide = len(info.shape) > 1 and info.shape[0] > 1 and prod(info.shape) % PACK_FORMATS[form].group == 0
    return wide and info.dtype in ("F32", "BF16", "F16") and info.nbytes > 0


def packed_bytes(nbytes: int, dtype: str, form: str) -> int:
    """About how many bytes are left of ``nbytes`` of a checkpoint in ``dtype``."""
    numbers = nbytes // BYTES[dtype]
    scales, length = PACK_FORMATS[form].scales(numbers)
    return numbers + length * BYTES[scales]
