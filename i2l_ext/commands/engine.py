"""From a command's options to how the engine computes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from i2l_ext.converters.errors import UserError
from i2l_ext.models import catalogue
from i2l_ext.weights.devices import PRECISIONS, WORDS, choose, facts

if TYPE_CHECKING:
    from i2l_ext.encoders.cache import Cache
    from i2l_ext.weights.compute import ComputeOptions


def engine(args: argparse.Namespace, model: str | None = None) -> ComputeOptions:
    """Device, dtype and memory bound. Which encoders of ``model`` are not computed in the
    dtype that was asked for is said on stderr. Raises UserError for a device or a model that there is not."""
    from i2l_ext.weights.compute import ComputeOptions

    options = ComputeOptions(device=device(args.device), dtype=precision(args.precision), memory=args.memory)
    for line in denied(options, model) if model else ():
        print(f"i2l: {line}", file=sys.stderr)
    return options


def denied(options: ComputeOptions, model: str) -> Iterator[str]:
    """A line for each encoder that cannot be computed in the dtype of ``options``, a wish."""
    for part in catalogue.find(model).encoders:
        choice = choose(facts(options.device), part.spec.safe_dtypes, options.dtype)
        if options.dtype not in ("auto", choice.dtype):
            yield f"{part.id} is computed in {choice}."


def device(name: str) -> str:
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


def precision(name: str) -> str:
    """What a user wishes the encoders' dtype to be: torch's name of one, or auto. Raises UserError for any other."""
    if name not in PRECISIONS:
        raise UserError(f"There is no precision {name!r}. There are: {', '.join(PRECISIONS)}.")
    return next((dtype for dtype, word in WORDS.items() if word == name), name)


def cache(args: argparse.Namespace) -> Cache | None:
    """The embedding cache, unless the user wants none."""
    from i2l_ext.encoders.cache import Cache

    return None if args.no_cache else Cache.default()
