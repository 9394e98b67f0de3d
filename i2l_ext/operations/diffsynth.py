"""Setting up DiffSynth-Studio, through which the v2 models run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from i2l_ext import requests
from i2l_ext.converters.errors import UserError
from i2l_ext.operations.compute import callbacks
from i2l_ext.operations.context import Context, Step
from i2l_ext.v2_models import setup


@dataclass(frozen=True)
class SetupResult:
    """``torch``: the kind of its build, "" where there is only one. ``present``: it is there, whole. About
    ``download_bytes`` are fetched and ``disk_bytes`` kept."""

    version: str
    folder: str
    torch: str
    origin: str
    download_bytes: int
    disk_bytes: int
    present: bool

    def json(self) -> dict[str, Any]:
        return asdict(self)


def show_setup(request: requests.SetupPlanRequest, context: Context) -> SetupResult:
    """What a set-up would do, or has done."""
    return _told(setup.plan_setup(request.torch))


def set_up_diffsynth(request: requests.SetupRequest, context: Context) -> SetupResult:
    """Set it up where it is not. What is broken off goes on next time. Raises UserError, Cancelled."""
    plan = setup.plan_setup(request.torch)
    if not plan.is_done:
        if not request.agreed:
            raise UserError("DiffSynth-Studio: say that it is to be set up (agreed).", "bad_request")
        context.reporter.plan([Step("setup", "setup", plan.download_bytes)])
        context.reporter.begin("setup")
        setup.set_up(plan, callbacks(context.reporter))
    return _told(plan)


def _told(plan: setup.SetupPlan) -> SetupResult:
    return SetupResult(
        setup.VERSION, str(plan.folder), plan.kind, plan.index or "PyPI", plan.download_bytes, plan.disk_bytes,
        plan.is_done,
    )  # fmt: skip
