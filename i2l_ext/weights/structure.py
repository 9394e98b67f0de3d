"""What a checkpoint must look like: its keys and shapes, and the hash that stands for them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from i2l_ext.converters.errors import UserError

Shapes = Mapping[str, Sequence[int]]


def structure_md5(shapes: Shapes) -> str:
    """DiffSynth-Studio's name for a checkpoint: the md5 of its sorted keys and shapes.

    For each tensor the two strings ``KEY:D0_D1_…`` and ``KEY``; all sorted, joined by commas. It speaks of structure,
    not of integrity.
    """
    names = [name for key, shape in shapes.items() for name in (f"{key}:{'_'.join(map(str, shape))}", key)]
    return hashlib.md5(",".join(sorted(names)).encode(), usedforsecurity=False).hexdigest()


def check_structure(name: str, expected: Shapes, found: Shapes) -> None:
    """Raises UserError that names the first tensor by which the file ``name`` differs from what it should be.

    Tensors beyond the expected ones are refused too: they are the sign of another model.
    """
    for key, shape in expected.items():
        if key not in found:
            raise UserError(f"{name}: the tensor {key!r} is missing. Is the download whole, and the right file?")
        if tuple(found[key]) != tuple(shape):
            raise UserError(f"{name}: the tensor {key!r} has the shape {list(found[key])} and not {list(shape)}.")
    surplus = next((key for key in found if key not in expected), None)
    if surplus is not None:
        raise UserError(f"{name}: holds the unknown tensor {surplus!r}: the file of another model?")
