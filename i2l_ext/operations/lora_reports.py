"""What can be asked about LoRA files: what one is, who loads it, what each rank keeps. Nothing of them is written.

Heavy imports are made where they are needed: to inspect a header takes a tenth of torch's import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext import requests
from i2l_ext.converters.errors import UserError
from i2l_ext.operations.context import Context, Step
from i2l_ext.requests import Request

if TYPE_CHECKING:
    from i2l_ext.converters.architectures import Architecture
    from i2l_ext.converters.bases import Fit
    from i2l_ext.converters.consumers import Verdict
    from i2l_ext.converters.inspection import Inspection

SHARES = (0.9, 0.95, 0.99, 0.999)
"""Shares of the effect for which an inspection tells the rank."""


@dataclass(frozen=True)
class InspectResult:
    """``rank_for_effect``: {share: smallest rank that keeps it}; it and ``plot`` are there where a plot was asked
    for. ``unplotted``: why there is none, although it was asked for."""

    found: Inspection
    plot: Path | None = None
    rank_for_effect: Mapping[str, int] | None = None
    unplotted: str | None = None

    def json(self) -> dict[str, Any]:
        told = self.found.json() | ({"unplotted": self.unplotted} if self.unplotted else {})
        return told if self.plot is None else {**told, "plot": str(self.plot), "rank_for_effect": self.rank_for_effect}


@dataclass(frozen=True)
class CheckResult:
    """What each program makes of a file of ``modules`` modules. ``base`` and ``fit``: where a base was asked for."""

    file: Path
    arch: Architecture
    key_format: str
    modules: int
    verdicts: tuple[Verdict, ...]
    base: Path | None = None
    fit: Fit | None = None

    def json(self) -> dict[str, Any]:
        told = {
            "file": str(self.file),
            "caution": self.arch.caution,
            "consumers": [self._verdict(verdict) for verdict in self.verdicts],
        }
        return told if self.fit is None else {**told, "base": {"file": str(self.base), **self.fit.json()}}

    def _verdict(self, verdict: Verdict) -> dict[str, Any]:
        repair = repair_of(self.file, verdict)
        told = verdict.json()
        about = {name: told.pop(name) for name in ("source", "version", "date")}
        return {**told, "repair": repair and repair.command_line(), **about}


@dataclass(frozen=True)
class RankCurveResult:
    """``kept``: {kind, or "all": [share of the effect kept at rank 1, 2, …]}."""

    kept: Mapping[str, list[float]]

    def json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_lora(request: requests.InspectRequest, context: Context) -> InspectResult:
    """Look at a LoRA file. If its update cannot be computed, it is described but not drawn. Raises UserError where it
    is no LoRA of a known model."""
    from i2l_ext.converters import inspection

    found = inspection.inspect(request.file, values=not request.header)
    if request.plot is None:
        return InspectResult(found)
    from i2l_ext.converters import Lora, plot, rank

    try:
        lora = Lora.read(request.file, request.base)
        values = rank.singular_values(lora, progress=step_progress(request, context))
    except UserError as error:
        return InspectResult(found, unplotted=str(error))
    plot.plot_lora(lora, values, request.plot, overwrite=request.overwrite)
    ranks = {f"{share:g}": rank.rank_for([*values.values()], share) for share in SHARES}
    return InspectResult(found, request.plot, ranks)


def check_lora(request: requests.CheckRequest, context: Context) -> CheckResult:
    """What every program makes of a LoRA file, and whether it fits a base. Raises UserError where it is no LoRA of a
    known model, or the base cannot be read."""
    from i2l_ext.converters import bases, consumers

    reading, verdicts = consumers.check(request.file)
    fit = bases.fits(reading.arch, reading.modules, bases.read_base(request.base)) if request.base else None
    return CheckResult(
        request.file, reading.arch, reading.key_format, len(reading.modules), tuple(verdicts), request.base, fit
    )


def repair_of(file: Path, verdict: Verdict) -> Request | None:
    """The request that makes a program load all of ``file``; None where there is nothing to do, or nothing helps."""
    if verdict.repair is None:
        return None
    options = dict(verdict.repair.options)
    if verdict.repair.operation == "export":
        options["output"] = Path("FOLDER")  # for the user to fill in
    advised: Callable[..., Request] = requests.ADVICE[verdict.repair.operation]
    return advised(file=file, **options)


def rank_curve(request: requests.RankCurveRequest, context: Context) -> RankCurveResult:
    """How much of a LoRA's effect each rank keeps. Raises UserError where it is no LoRA of a known model."""
    from i2l_ext.converters import Lora, rank

    lora = Lora.read(request.file)
    values = rank.singular_values(lora, progress=step_progress(request, context))
    most = max(map(len, values.values()))
    at = [rank.effect_kept(lora.arch, values, dict.fromkeys(values, number)) for number in range(1, most + 1)]
    return RankCurveResult({kind: [round(one[kind], 5) for one in at] for kind in at[0]})


def step_progress(request: Request, context: Context) -> Callable[[float], None]:
    """Begin the operation's only step; what is to be called with the share that is done, 0 to 1, after each module.
    It raises Cancelled when the user wants to stop."""
    reporter = context.reporter
    reporter.plan([Step(request.kind, request.kind)])
    reporter.begin(request.kind)

    def progress(share: float) -> None:
        reporter.check()
        reporter.progress(share)

    return progress
