"""What tab, HTTP interface and ComfyUI's nodes ask for: requests, built, checked and put into the engine's queue."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path, PurePath
from types import NoneType
from typing import Any

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.job import Log
from i2l_ext.engine.queue import Job, Queue, state_folder
from i2l_ext.library import names
from i2l_ext.requests import (
    CheckRequest,
    ConvertRequest,
    DoctorRequest,
    DownloadRequest,
    DrawRequest,
    EngineOptions,
    ExportRequest,
    InspectRequest,
    MakeRequest,
    MergeRequest,
    RankCurveRequest,
    RankRequest,
    RepairRequest,
    Request,
    RunRequest,
    VerifyRequest,
)
from i2l_ext.service.consent import ConsentNeeded, Consents
from i2l_ext.service.host import Host, list_loras
from i2l_ext.service.library import Library
from i2l_ext.service.model_list import CHANGES_MODELS, ModelList, missing_parts
from i2l_ext.service.previews import preview_uploads, whole_upload
from i2l_ext.service.redaction import private_folders, redact_paths
from i2l_ext.service.settings import make_fields
from i2l_ext.service.targets import CHANGES_LIBRARY, Targets
from i2l_ext.service.uploads import Uploads, upload_folders

MAX_DESCRIPTION, MAX_ACTIVATION_TEXT = 4000, 1000
"""Characters of the texts for a LoRA's card; what is longer is cut off."""


class DownloadNeeded(UserError):
    """The model that was chosen is not here, nor on its way."""

    def __init__(self, model: str) -> None:
        super().__init__(f"{model} is not downloaded yet. Download it first.", "weights_missing")
        self.model = model


class Service:
    """One for each process. Pictures are ids of uploads; LoRAs are (path, name in the list). Every method that starts a
    job raises UserError where the request is refused, and QueueFull."""

    def __init__(self, host: Host, state: Path | None = None, command: Sequence[str] | None = None) -> None:
        self._state = state or state_folder()
        self.host = host
        self.uploads = Uploads(self._state / "uploads")
        self.uploads.sweep()
        self.queue = Queue(
            self._state / "jobs", command, environment=self._environment, run_in=host.exclusive_gpu,
            on_end=self._on_end, redact=self._redact,
        )  # fmt: skip
        self.models = ModelList(self.queue, lambda: host.option("i2l_model"))
        self.targets = Targets(host, self.queue)
        self.library = Library(self)
        self.consents = Consents(self)
        self.panes: dict[str, str] = {}
        """Job -> the pane where it was asked for, where its kind does not tell."""
        self._after: dict[str, list[str]] = {}
        """Download -> the jobs that wait for its model."""

    def preview(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """What the models see in uploads, by ids of a tray: ``{id, picture, width, height}`` or ``{id, error}``."""
        return preview_uploads(self.uploads, self.queue, ids)

    def whole_picture(self, id: str) -> dict[str, Any]:
        """The whole picture of an upload, to choose a square in: ``{picture, width, height}``."""
        return whole_upload(self.uploads, self.queue, id)

    def make(
        self, pictures: Sequence[str], *, name: str = "", model: str | None = None, subfolder: str = "",
        ask: bool = False, draw: bool = True, **values: Any,
    ) -> Job:  # fmt: skip
        """Make a LoRA. ``draw``: with one of the miniature it is shown what it draws. ``values``: other fields of a
        MakeRequest; None stands for the default. With ``ask`` it raises DownloadNeeded where the model is neither here
        nor on its way, and ConsentNeeded where its code is not agreed to, once all the rest is found good."""
        if not pictures:
            raise UserError("There is no picture yet. Drop at least one.")
        model = self.models.choose() if model is None else model
        if self.models.rows():
            self.models.find(model)
        request = MakeRequest((), **make_fields(self.host, model, values))
        request.validate()
        if request.weights is not None and len(request.weights) != len(pictures):
            raise UserError("Give one weight for each picture.")
        if request.crops is not None and len(request.crops) != len(pictures):
            raise UserError("Give one square for each picture.")
        request = replace(
            request, pictures=tuple(path.absolute() for path in self.uploads.paths(pictures)),
            folder=self.targets.folder(subfolder).absolute(), description=request.description[:MAX_DESCRIPTION],
            activation_text=request.activation_text[:MAX_ACTIVATION_TEXT],
        )  # fmt: skip
        with self.targets.lock:
            free = self.targets.free_name(name)
            fetching = self.fetching().get(model)
            if (
                ask
                and fetching is None
                and any(row["name"] == model and not row["ready"] for row in self.models.rows() or ())
            ):
                raise DownloadNeeded(model)
            if ask and self.consents.is_needed(model):
                raise ConsentNeeded(model)
            job = self.submit(free, replace(request, name=free), draw=draw)
        if fetching is not None:
            self._after.setdefault(fetching.id, []).append(job.id)
        return job

    def fetching(self) -> dict[str, Job]:
        """The models that are being downloaded, or will be, and their jobs."""
        return {job.title: job for job in self.queue.active() if job.kind == "download" and job.state != "stopping"}

    def make_variants(
        self, id: str, strengths: Sequence[float], ranks: Sequence[int], doubled: Sequence[int]
    ) -> list[Job]:
        """Make the LoRA of a job again with another strength, another rank, or one picture (from 1) counted twice."""
        job = self.queue.find(id)
        if job is None or job.kind != "make" or not job.request or not job.result:
            raise UserError("How that LoRA was made is no longer known. Make it again.")
        made = MakeRequest.from_json(job.request)
        weights = made.weights or (1.0,) * len(made.pictures)
        changes: list[tuple[str, dict[str, Any]]] = [(f"s{one:g}", {"strength": one}) for one in strengths]
        changes += [(f"r{one}", {"rank": one}) for one in ranks]
        for number in doubled:
            changed = tuple(w * (2 if at == number else 1) for at, w in enumerate(weights, 1))
            changes.append((f"p{number}", {"weights": changed}))
        if not changes:
            raise UserError("Choose at least one variant.")
        for _, change in changes:
            replace(made, **change).validate()
        jobs = []
        for end, change in changes:
            with self.targets.lock:
                free = self.targets.free_name(names.clean_name(f"{job.result['name']}-{end}"))
                jobs.append(self.submit(free, replace(made, name=free, **change), draw=True))
        return jobs

    def loras(self) -> dict[str, Path]:
        """Every LoRA, by the name that lists show, the newest first."""
        return list_loras(self.host.lora_folders())

    def lora(self, shown: str) -> Path:
        """The LoRA that lists show under this name. Raises UserError."""
        found = self.loras().get(shown)
        if found is None:
            raise UserError(f"There is no LoRA {str(shown)[:120]!r} in the folder. Reload the list.")
        return found

    def inspect(self, path: Path, name: str) -> Job:
        """Look into a LoRA: what it is, its plot, who loads it."""
        return self.submit(name, InspectRequest(path))

    def rank_curve(self, path: Path, name: str) -> Job:
        """How much of a LoRA each rank keeps."""
        return self.submit(name, RankCurveRequest(path))

    def check(self, path: Path, name: str) -> Job:
        """Who loads a LoRA, who does not, and what repairs it."""
        return self.submit(name, CheckRequest(path))

    def convert(self, path: Path, name: str, key_format: str, save_as: str = "", **values: Any) -> Job:
        """Write a LoRA in another key format. ``values``: other fields of a ConvertRequest."""
        request = ConvertRequest(path, key_format, **values)
        return self._write(request, save_as or names.clean_name(f"{Path(name).stem}-{key_format}"))

    def resize(self, path: Path, name: str, save_as: str = "", **values: Any) -> Job:
        """Write a LoRA at another rank. ``values``: fields of a RankRequest."""
        request = RankRequest(path, **values)
        amount = f"rank{request.rank}" if request.rank else f"effect{request.effect_kept or 0:g}"
        return self._write(request, save_as or names.clean_name(f"{Path(name).stem}-{amount}"))

    def merge(self, parts: Sequence[tuple[Path, float]], save_as: str = "", **values: Any) -> Job:
        """Write one LoRA from several, each with a weight. ``values``: fields of a MergeRequest."""
        request = MergeRequest(tuple(f"{path}:{weight!r}" for path, weight in parts), **values)
        return self._write(request, save_as or names.clean_name("-".join(path.stem for path, _ in parts)))

    def _write(self, request: Any, name: str) -> Job:
        """Write a LoRA under a fresh name in the LoRA folder: ``name`` or one like it."""
        request.validate()
        with self.targets.lock:
            stem = self.targets.free_name(name)
            return self.submit(stem, replace(request, output=self._lora_file(stem)))

    def draw(self, prompts: Sequence[str], loras: Sequence[tuple[Path, float]], seed: int, size: int) -> Job:
        """Draw with the miniature: an image for each prompt."""
        request = DrawRequest(tuple(prompts), tuple(f"{path}:{weight!r}" for path, weight in loras), seed, size)
        request.validate()
        return self.submit("", request)

    def export(
        self, path: Path, name: str, trainer: str, rank: int | None, pictures: Sequence[Path] = (),
        caption: str | None = None,
    ) -> Job:  # fmt: skip
        """Write a start folder for a trainer. ``rank`` None: that of the LoRA; ``pictures``: to train on, those that
        made the LoRA unless given; ``caption`` None: the LoRA's activation text."""
        request = ExportRequest(path, trainer, rank, pictures=tuple(pictures), caption=caption)
        request.validate()
        start = f"{trainer}-rank{rank}" if rank else trainer
        stem = names.clean_name(f"{Path(name).stem}-{start}")
        with self.targets.lock:
            folder = self.targets.start_folder(stem)
            return self.submit(folder.name, replace(request, output=folder))

    def train(self, id: str) -> Job:
        """Run the trainer of the settings from the start folder that the job ``id`` has written. That is for those who
        sit at this machine: raises UserError where the page is open to others."""
        if not self.host.is_local:
            raise UserError("Start it at the machine itself: i2l run FOLDER --in THE_TRAINERS_FOLDER", "forbidden")
        job, home = self.queue.find(id), self.host.option("i2l_trainer")
        written = job.result if job is not None and job.state == "done" and job.kind in ("export", "repair") else None
        folder = self.targets.start_folders / PurePath(written["folder"]).name if written else None
        if folder is None or not folder.is_dir():
            raise UserError("That start folder is no longer known. Write it again.")
        if not home:
            raise UserError("Name the trainer's folder in the settings first.")
        python = self.host.option("i2l_trainer_python")
        with self.targets.lock:
            free = self.targets.free_name(names.clean_name(f"{folder.name}-trained"))
            request = RunRequest(
                folder,
                Path(home).expanduser().absolute(),
                Path(python).expanduser().absolute() if python else None,
                self._lora_file(free),
            )
            return self.submit(free, request)

    def log_of(self, job: Job) -> Log:
        """What the program has said that a job runs, as a client may see it."""
        known = [folder.absolute().parent for folder in self.host.lora_folders()]
        return replace(job.log, lines=tuple(redact_paths(job.log.lines, [*known, *private_folders()], others=True)))

    def repair(self, id: str, consumer: str) -> Job:
        """Write anew, so that ``consumer`` loads it, the LoRA that the job ``id`` made or inspected."""
        job = self.queue.find(id)
        if job is None or job.kind not in ("make", "inspect") or not (job.request.get("file") or job.result):
            raise UserError("That LoRA is no longer known. Inspect it again.")
        path = self.lora(job.result["file"]) if job.kind == "make" else Path(job.request.get("file") or "")
        if not path.is_file():
            raise UserError("That LoRA is no longer there. Inspect another one.")
        stem = names.clean_name(f"{Path(job.title).stem}-{consumer}")
        with self.targets.lock:
            name = self.targets.free_name(stem)
            request = RepairRequest(path, consumer, self._lora_file(name), self.targets.start_folder(stem))
            asked = self.submit(name, request)
        self.panes[asked.id] = "make" if job.kind == "make" else "inspect"
        return asked

    def _lora_file(self, stem: str) -> Path:
        return self.host.lora_folder() / f"{stem}.safetensors"

    def download(self, model: str, source: str = "huggingface", *, agreed: bool = False, packed: bool = False) -> Job:
        """Fetch what a model lacks from a hub, once its licences are ``agreed`` to. ``packed``: pack it on the way."""
        request = DownloadRequest(model, source, agreed=True, packed=packed)
        request.validate()
        parts = missing_parts(self.models.find(model))
        if parts and not agreed:
            licences = "; ".join(dict.fromkeys(part["licence"] for part in parts))
            raise UserError(f"{model}: agree to the licences before the download ({licences}).", "licences")
        return self.submit(model, request)

    def verify(self, model: str) -> Job:
        """Read every byte of a model's files."""
        self.models.find(model)
        return self.submit(model, VerifyRequest(model))

    def doctor(self) -> Job:
        """What a bug report needs."""
        return self.submit("", DoctorRequest(self.host.title))

    def submit(self, title: str, request: Request, **more: Any) -> Job:
        """Put a request into the queue, to be computed as the settings say."""
        gigabytes = self.host.option("i2l_cache_gb")
        options = EngineOptions(
            device=self.host.option("i2l_device"), precision=self.host.option("i2l_precision"),
            memory=self.host.option("i2l_memory") or None, cache_bytes=int(gigabytes * 10**9),
            diffsynth=self.host.option("i2l_diffsynth") or None,
        )  # fmt: skip
        message = {"request": request.json(), "options": options.json(), **more}
        return self.queue.submit(request.kind, title, message)

    def _environment(self) -> Mapping[str, str]:
        named = [str(folder) for folder in self.host.models_folders()]
        models = {"I2L_MODELS": os.pathsep.join(named)} if named else {}
        return {"I2L_STATE": str(self._state), **models}  # where pictures lie that were uploaded

    def _redact(self, job: Job) -> None:
        """No folder of this machine in what a client sees. Where model files lie is in the list of models alone."""
        if job.kind == "models":
            return
        self._name_pictures(job)
        loras = [folder.absolute() for folder in self.host.lora_folders()]
        known = [*loras, *(folder.parent for folder in loras), *self.host.models_folders(), self._state,
                 *private_folders(), *upload_folders(),
                 *_folders_of(job)]  # fmt: skip
        job.result = redact_paths(job.result, known)
        job.error, job.tail = (redact_paths(value, known, others=True) for value in (job.error, job.tail))

    def _name_pictures(self, job: Job) -> None:
        """Uploads lie under their hashes; a person knows the pictures by their numbers."""

        def named(text: str) -> str:
            for number, path in enumerate(job.request.get("pictures") or (), 1):
                text = text.replace(str(path), f"picture {number}").replace(Path(path).name, f"picture {number}")
            return text

        job.error, job.tail = job.error and named(job.error), list(map(named, job.tail))

    def _on_end(self, job: Job) -> None:
        for id in self._after.pop(job.id, ()) if job.state != "done" else ():
            if job.state == "failed":
                self.queue.give_up(id, "Not made: the download failed.", "weights_missing")
            else:
                self.queue.cancel(id)
        if job.kind in CHANGES_LIBRARY and job.state == "done":
            self.targets.forget()
            self.host.refresh_loras()
        if job.kind in CHANGES_MODELS:
            self.models.rows()  # looked for before somebody asks


def _folders_of(job: Job) -> list[Path]:
    """The folder of the file that a job was given, that of its trainer, and where it has found a base model."""
    file, home = job.request.get("file"), job.request.get("trainer_folder")
    found = job.result.get("bases") if isinstance(job.result, dict) else None
    bases = [path for path in found.values() if isinstance(path, str)] if isinstance(found, dict) else []
    return [*(Path(path).parent for path in (file, *bases) if path), *(Path(path) for path in [home] if path)]


def tray_pictures(form: Mapping[str, Any]) -> tuple[list[str], list[float | None]]:
    """Ids and weights of the pictures in the page's tray; None for a weight that is no number. Raises UserError."""
    tray = form.get("pictures")
    if not isinstance(tray, list):
        raise UserError("The list of pictures is damaged. Reload the page.")
    ids: list[str] = []
    weights: list[float | None] = []
    for entry in tray:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError("The list of pictures is damaged. Reload the page.")
        if isinstance(entry[1], bool) or not isinstance(entry[1], (int, float, NoneType)):
            raise UserError("The list of pictures is damaged. Reload the page.")
        ids.append(entry[0])
        weights.append(None if entry[1] is None else float(entry[1]))
    return ids, weights


def checked_weights(weights: Sequence[float | None]) -> tuple[float, ...]:
    """The weights, each a number greater than 0. Raises UserError with the numbers of pictures that have another."""
    wrong = [number for number, one in enumerate(weights, 1) if one is None or not 0 < one < inf]
    if wrong:
        named = f"picture {wrong[0]}" if len(wrong) == 1 else f"pictures {', '.join(map(str, wrong))}"
        raise UserError(
            f"The share of {named} must be a number greater than 0. To leave a picture out, remove it.", "out_of_range"
        )
    return tuple(one for one in weights if one is not None)
