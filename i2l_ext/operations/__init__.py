"""What the program can do: a function for each request, with a frozen result that has ``json()``.

Nothing here knows of command lines, pages or HTTP. What is heavy is imported when an operation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from i2l_ext.operations import (
    diffsynth,
    doctor,
    draw,
    library,
    lora_files,
    lora_reports,
    make,
    models,
    packing,
    previews,
    training_run,
    trust,
)
from i2l_ext.operations.context import Context, Reporter, Step
from i2l_ext.requests import Request

__all__ = ["OPERATIONS", "Context", "Reporter", "Step", "perform"]

OPERATIONS: Mapping[str, Callable[[Any, Context], Any]] = {
    "make": make.make_lora,
    "batch": make.make_batch,
    "look": previews.preview_pictures,
    "draw": draw.draw_pictures,
    "inspect": lora_reports.inspect_lora,
    "check": lora_reports.check_lora,
    "curve": lora_reports.rank_curve,
    "convert": lora_files.convert_lora,
    "rank": lora_files.resize_lora,
    "merge": lora_files.merge_loras,
    "export": lora_files.export_lora,
    "repair": lora_files.repair_lora,
    "run": training_run.run_trainer,
    "library": library.list_library,
    "discard": library.discard_loras,
    "models": models.list_models,
    "download": models.download_model,
    "pack": packing.pack_model,
    "trust": trust.trust_model,
    "setup_plan": diffsynth.show_setup,
    "setup": diffsynth.set_up_diffsynth,
    "verify": models.verify_models,
    "cache": models.encoder_cache,
    "doctor": doctor.examine_installation,
}
"""By kind of request."""


def perform(request: Request, context: Context) -> Any:
    """Check a request and do it; its result. Raises UserError, Cancelled."""
    request.validate()
    return OPERATIONS[request.kind](request, context)
