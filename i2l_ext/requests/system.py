"""Requests on this installation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from i2l_ext.converters.errors import UserError
from i2l_ext.requests.fields import Request, option

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
"""In what encoders are computed."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(size: str) -> int:
    """Bytes of "6GB", "800MB", "6G" or a plain number. Raises UserError for any other text."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)i?B?", size.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise UserError(f"{size[:80]!r} is not a size such as 6GB.", "out_of_range")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class DoctorRequest(Request):
    """What a bug report needs. ``host``: the program the extension runs in. ``licences``: those of all packages,
    instead. ``selftest``: what only a real system can tell, instead."""

    kind: ClassVar[str] = "doctor"

    host: str = option("the program the extension runs in", "", local=True)
    licences: bool = option("print the licences of all that is used, instead", False)
    selftest: bool = option("make, convert and read back a small LoRA, measure, and print ten lines, instead", False)


@dataclass(frozen=True)
class EngineOptions(Request):
    """Where and how the engine computes, whatever is asked. ``memory`` is a size such as 6GB; ``cache_bytes`` bounds
    the encoder cache: None: the usual bound, 0: no cache."""

    kind: ClassVar[str] = "engine"

    device: str = option("cpu, cuda, cuda:1, mps or auto (default)", "auto")
    memory: str | None = option("bound on memory, such as 6GB", None, metavar="SIZE", syntax=parse_size)
    precision: str = option("of the encoders; see `i2l doctor`", "auto", choices=PRECISIONS)
    diffsynth: str | None = option(
        "the environment of DiffSynth-Studio, for v2 models (default: I2L_DIFFSYNTH)", None, metavar="DIR", local=True
    )
    cache_bytes: int | None = option("bound on the encoder cache; 0: none", None, minimum=0)
