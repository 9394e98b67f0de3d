"""From a command's options to how the engine computes."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from i2l_ext.converters.errors import UserError

if TYPE_CHECKING:
    from i2l_ext.checkpoints.embeddings import Cache
    from i2l_ext.checkpoints.stream import Run


def engine(args: argparse.Namespace) -> Run:
    """Device, dtype and memory bound; Ctrl-C stops by itself."""
    from i2l_ext.checkpoints.stream import Run

    return Run(device=device(args.device), dtype=precision(args.precision), memory=args.memory)


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
    """The encoders' dtype; bfloat16, in which the weights are published, unless the user insists."""
    return {"auto": "bfloat16", "bf16": "bfloat16", "fp32": "float32"}[name]


def cache(args: argparse.Namespace) -> Cache | None:
    """The embedding cache, unless the user wants none."""
    from i2l_ext.checkpoints.embeddings import Cache

    return None if args.no_cache else Cache.default()
