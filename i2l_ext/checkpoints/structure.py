"""A checkpoint is recognised by its structure: the names and shapes of its tensors, not its file name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence


def structure_md5(shapes: Mapping[str, Sequence[int]]) -> str:
    """The md5 (32 hex digits) by which DiffSynth-Studio knows a checkpoint of tensors ``{key: shape}``.

    Two strings a tensor, ``KEY:D0_D1_…`` and ``KEY``, all of them sorted, joined by commas. It says what a file is
    made of and nothing about its values.
    """
    words = [word for key, shape in shapes.items() for word in (f"{key}:{'_'.join(map(str, shape))}", key)]
    return hashlib.md5(",".join(sorted(words)).encode(), usedforsecurity=False).hexdigest()
