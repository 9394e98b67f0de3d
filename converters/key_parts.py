"""A key of a LoRA file, split: prefix, the module's name, and the suffix that says which of its tensors it is."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from . import networks
from .key_formats import FACTOR_PAIRS, PREFIXES, SUFFIXES, WRAPPER, ends_with


class KeyParts(NamedTuple):
    """A key, split. A tuple, because a file has thousands. ``form``: of a factor, the suffix of its down factor."""

    key: str
    prefix: str
    stem: str
    suffix: str
    part: str
    form: str


PARTS = SUFFIXES | networks.SUFFIXES
"""What may follow the module's name -> which of its tensors that is, of any network."""

_DOWN_OF = {up: down for down, up in FACTOR_PAIRS.items()}
_SUFFIX = ends_with(PARTS)
_PREFIX = re.compile("|".join(map(re.escape, filter(None, PREFIXES))))
_COMPILED = re.compile(WRAPPER)
MOST_PREFIXES = 6
"""One after another. The longest chain seen has four."""


def without_wrapper(name: str) -> str:
    """The name without what torch.compile puts into it."""
    return _COMPILED.sub("", name)


@lru_cache(maxsize=64)  # the keys of one module stand together
def stems(name: str) -> tuple[tuple[str, str], ...]:
    """Every way to take prefixes off a name: (prefix, rest), the longest prefix first."""
    cuts = [0]
    while len(cuts) <= MOST_PREFIXES and (found := _PREFIX.match(name, cuts[-1])):
        cuts.append(found.end())
    return tuple((name[:cut], name[cut:]) for cut in reversed(cuts))


def split_key(key: str) -> list[KeyParts]:
    """Every way to split a key, the longest prefix first; empty if it is not a LoRA key.

    The suffix is the longest that fits: the first match from the left.
    """
    suffix = _SUFFIX.search(key)
    if suffix is None:
        return []
    part = PARTS[suffix[1]]
    factor = part in ("down", "up")
    form = _DOWN_OF.get(suffix[1], suffix[1]) + (suffix[2] or "") if factor else ""
    name, wrapped = key[: suffix.start()], ""
    if "_orig_mod" in name:
        name, wrapped = without_wrapper(name), "_orig_mod."
    return [KeyParts(key, wrapped + prefix, stem, suffix[0], part, form) for prefix, stem in stems(name)]
