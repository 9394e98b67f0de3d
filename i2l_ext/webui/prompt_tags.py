"""``<i2l:NAME:W>`` in a prompt: a LoRA on the positive branch of guidance, and what the negative branch has.

<i2l:my_style:0.8>                    on the positive branch; my_style-grey on the negative one, if it is there
<i2l:my_style:0.8:0>                  nothing on the negative branch
<i2l:my_style:0.8:0.5>                at 0.5 on the negative branch: my_style-grey, or my_style itself
<i2l:my_style:0.8:both>               on both, as <lora:my_style:0.8>
<i2l:my_style:0.8:from=0.2:to=0.9>    from a fifth of the steps to nine tenths
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from i2l_ext.converters.errors import UserError

NETWORK = "i2l"
"""The word after the bracket."""
BOTH = "both"


@dataclass(frozen=True)
class BranchTag:
    """A tag, read. ``negative``: the LoRA weight on the negative branch; None where the tag does not say. ``both``: the
    LoRA itself is on both branches, without a grey one. ``start``, ``stop``: shares of the steps."""

    name: str
    positive: float = 1.0
    negative: float | None = None
    both: bool = False
    start: float = 0.0
    stop: float = 1.0


def parse_tag(items: Sequence[str]) -> BranchTag:
    """A tag from its parts between the colons, without the first. Raises UserError that says what is wrong."""
    text = f"<{NETWORK}:{':'.join(items)}>"
    plain = [item.strip() for item in items if "=" not in item]
    named = dict(item.strip().split("=", 1) for item in items if "=" in item)
    if unknown := named.keys() - {"from", "to"}:
        raise UserError(f"{text}: {min(unknown)}= is not known; a tag can have from= and to=.")
    if not plain or not plain[0]:
        raise UserError(f"{text}: has no name. Write <{NETWORK}:NAME:1>.")
    if len(plain) > 3:
        raise UserError(f"{text}: has too many numbers. Write <{NETWORK}:NAME:WEIGHT:NEGATIVE WEIGHT>.")
    name, weight, negative = (*plain, "", "")[:3]
    start, stop = (_number(named.get(key, default), text, key) for key, default in (("from", "0"), ("to", "1")))
    if not 0 <= start < stop <= 1:
        raise UserError(f"{text}: from and to are shares of the steps, from 0 to 1, and from is the smaller one.")
    positive = _number(weight or "1", text, "the weight")
    if negative.lower() == BOTH:
        return BranchTag(name, positive, positive, True, start, stop)
    own = _number(negative, text, "the negative weight") if negative else None
    return BranchTag(name, positive, own, False, start, stop)


def _number(text: str, tag: str, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{tag}: {what} must be a number, not {text!r}.")
    return number
