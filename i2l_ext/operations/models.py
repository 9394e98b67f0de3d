"""What can be asked of models: list, download, verify; and of the encoder cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext import requests
from i2l_ext.converters.errors import UserError
from i2l_ext.models import catalogue
from i2l_ext.operations.context import Context, Reporter, Step

if TYPE_CHECKING:
    from i2l_ext.models.catalogue import Checkpoint, I2LModel
    from i2l_ext.models.checked_files import DownloadCallbacks
    from i2l_ext.models.listing import ModelStatus
    from i2l_ext.models.store import Folders


@dataclass(frozen=True)
class ModelsResult:
    """Every model, and which of its files are here."""

    rows: Sequence[ModelStatus]

    def json(self) -> list[dict[str, Any]]:
        return [row.json() for row in self.rows]


@dataclass(frozen=True)
class DownloadPlan:
    """What a download would fetch: ``missing`` checkpoints into ``folders.own``."""

    model: I2LModel
    folders: Folders
    missing: Sequence[Checkpoint]

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.missing)

    @property
    def packed_bytes(self) -> int:
        """About how many bytes they take packed."""
        from i2l_ext.models.pack import PACKED_KINDS
        from i2l_ext.weights.packing import packed_bytes

        return sum(
            packed_bytes(part.nbytes, part.dtype, requests.PACK_FORMS[0]) if part.kind in PACKED_KINDS else part.nbytes
            for part in self.missing
        )

    @property
    def licences(self) -> str:
        """The licences of what is missing, in one line."""
        return "; ".join(dict.fromkeys(part.licence for part in self.missing))


@dataclass(frozen=True)
class DownloadResult:
    """The files that were fetched; none where nothing was missing."""

    model: str
    files: Sequence[Path]

    def json(self) -> dict[str, Any]:
        return {"model": self.model, "files": [str(path) for path in self.files]}


@dataclass(frozen=True)
class VerifiedPart:
    """``held``: what the files of a checkpoint were compared with; ``problem``: why they cannot be used. Neither:
    they are not here."""

    id: str
    held: str | None = None
    file: Path | None = None
    problem: str | None = None


@dataclass(frozen=True)
class VerifyResult:
    """What was found of each checkpoint."""

    model: str | None
    parts: Sequence[VerifiedPart]

    @property
    def problems(self) -> list[str]:
        return [part.problem for part in self.parts if part.problem is not None]

    def json(self) -> dict[str, Any]:
        found = [{"id": part.id, "found": part.held or part.problem or "not here"} for part in self.parts]
        return {"model": self.model, "parts": found}


@dataclass(frozen=True)
class CacheResult:
    """What the encoder cache holds, or held before it was cleared."""

    folder: Path
    entries: int
    bytes: int

    def json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "entries": self.entries, "bytes": self.bytes}


def list_models(request: requests.ModelsRequest, context: Context) -> ModelsResult:
    """Every model and which of its files are here."""
    from i2l_ext.models.listing import listing
    from i2l_ext.v2_models.consent import agreed_digests

    repos = {noted.get("repo") for noted in agreed_digests().values()}
    rows = listing(structures=request.structures)
    return ModelsResult([replace(row, agreed=row.has_code and row.parts[0].repo in repos) for row in rows])


def plan_download(request: requests.DownloadRequest) -> DownloadPlan:
    """What a download would fetch, and where to. Raises UserError for a model that there is not."""
    from i2l_ext.models.download import missing
    from i2l_ext.models.store import Folders

    model, folders = catalogue.find(request.model), Folders.default()
    if request.folder:
        own = request.folder.expanduser().absolute()
        folders = replace(folders, own=own, webui=(folders.own, *folders.webui))
    return DownloadPlan(model, folders, missing(model, folders))


def download_model(request: requests.DownloadRequest, context: Context) -> DownloadResult:
    """Fetch what a model lacks. What is broken off goes on there next time.

    Raises UserError; with the code ``licences`` where something is missing and the user has not agreed to them.
    """
    from i2l_ext.models import download as downloads
    from i2l_ext.models.hubs import HUBS
    from i2l_ext.models.store import remember

    request.validate()
    plan = plan_download(request)
    if not plan.missing:
        return DownloadResult(plan.model.name, [])
    if not request.agreed:
        raise UserError(f"{plan.model.name}: agree to the licences before the download ({plan.licences}).", "licences")
    context.reporter.plan([Step("download", "download", plan.bytes)])
    remember(plan.folders.own)
    job = byte_callbacks(context.reporter)
    form = requests.PACK_FORMS[0] if request.packed else ""
    return DownloadResult(
        plan.model.name, downloads.download(plan.missing, HUBS[request.source](), plan.folders.own, job, form)
    )


def verify_models(request: requests.VerifyRequest, context: Context) -> VerifyResult:
    """Read every byte of model files, and compare them with the hub's checksums, or else with the structure.

    Raises UserError for a model that there is not.
    """
    from i2l_ext.models.store import Folders

    chosen = [catalogue.find(request.model)] if request.model else list(catalogue.MODELS.values())
    folders = Folders.default()
    parts = {part.id: part for model in chosen for part in model.parts}.values()
    return VerifyResult(request.model, [_verify(part, folders, context.reporter) for part in parts])


def _verify(part: Checkpoint, folders: Folders, reporter: Reporter) -> VerifiedPart:
    from i2l_ext.models.checked_files import verify
    from i2l_ext.models.store import locate

    reporter.plan([Step(f"verify {part.id}", f"verify {part.id}", part.nbytes)])
    try:
        paths = locate(part, folders)
        if paths is None:
            return VerifiedPart(part.id)
        held = verify(part, paths, byte_callbacks(reporter))
        return VerifiedPart(part.id, held, paths[0])
    except UserError as error:
        return VerifiedPart(part.id, problem=str(error))


def encoder_cache(request: requests.CacheRequest, context: Context) -> CacheResult:
    """What the encoder cache holds; with ``clear`` it is deleted."""
    from i2l_ext.encoders.cache import EmbeddingCache

    held = EmbeddingCache.default()
    return CacheResult(held.folder, *(held.clear() if request.clear else held.size()))


def byte_callbacks(reporter: Reporter) -> DownloadCallbacks:
    """The reporter, as what reads and writes whole files knows it."""
    from i2l_ext.models.checked_files import DownloadCallbacks

    return DownloadCallbacks(_phases(reporter), reporter.cancelled)


def _phases(reporter: Reporter) -> Callable[[str, int, int], None]:
    """Bytes of a phase, reported as a step of their own."""
    now = ""

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal now
        if phase != now:
            now = phase
            reporter.plan([Step(phase, phase, total)])
            reporter.begin(phase)
        reporter.progress(done / max(total, 1))

    return progress
