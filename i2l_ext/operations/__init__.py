"""What the program can do: a function for each request, with a frozen result that has ``json()``.

Nothing here knows of command lines, pages or HTTP. What is heavy is imported when an operation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from i2l_ext.operations import doctor, lora_files, make, models, previews
from i2l_ext.operations.context import Context, Reporter, Step
from i2l_ext.requests import Request

__all__ = ["OPERATIONS", "Context", "Reporter", "Step", "perform"]

OPERATIONS: Mapping[str, Callable[[Any, Context], Any]] = {
    "make": make.make,
    "look": previews.preview,
    "inspect": lora_files.inspect,
    "check": lora_files.check,
    "curve": lora_files.rank_curve,
    "convert": lora_files.convert,
    "rank": lora_files.rank,
    "merge": lora_files.merge,
    "export": lora_files.export,
    "mend": lora_files.repair,
    "models": models.models,
    "download": models.download,
    "verify": models.verify,
    "cache": models.cache,
    "doctor": doctor.doctor,
}
"""By kind of request."""


def perform(request: Request, context: Context) -> Any:
    """Check a request and do it; its result. Raises UserError, Cancelled."""
    request.validate()
    return OPERATIONS[request.kind](request, context)
