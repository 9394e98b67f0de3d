"""Requests on this installation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from i2l_ext.requests.fields import Request, option


@dataclass(frozen=True)
class DoctorRequest(Request):
    """What a bug report needs. ``host``: the program the extension runs in. ``licences``: those of all packages,
    instead."""

    kind: ClassVar[str] = "doctor"

    host: str = option("the program the extension runs in", "", local=True)
    licences: bool = option("print the licences of all that is used, instead", False)


@dataclass(frozen=True)
class EngineOptions(Request):
    """Where and how the engine computes, whatever is asked. ``memory`` is a size such as 6GB; ``cache_bytes`` bounds
    the encoder cache: None: the usual bound, 0: no cache."""

    kind: ClassVar[str] = "engine"

    device: str = option("cpu, cuda, cuda:1, mps or auto (default)", "auto")
    memory: str | None = option("bound on memory, such as 6GB", None, metavar="SIZE")
    precision: str = option("of the encoders", "auto", choices=("auto", "fp32", "bf16"))
    cache_bytes: int | None = option("bound on the encoder cache; 0: none", None, minimum=0)
