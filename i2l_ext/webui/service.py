"""What a user may ask for: checked, and made a job. The tab and the HTTP interface both come here."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from i2l_ext import library
from i2l_ext.converters.dialects import DIALECTS
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.trainers import TRAINERS
from i2l_ext.engine import queue
from i2l_ext.engine.queue import Busy, Job, Queue
from i2l_ext.library import names
from i2l_ext.webui import redaction
from i2l_ext.webui.host import Alone
from i2l_ext.webui.recent import Recent
from i2l_ext.webui.settings import DTYPES, HUBS
from i2l_ext.webui.uploads import MOST_PICTURES, Uploads, upload_folders

PATIENCE = 120.0
"""Seconds for a look at pictures."""

MOMENT = 5.0
"""Seconds for which the names of the LoRA folder are taken to be those that were there, while a name is typed."""

WRITING = frozenset({"make", "convert", "mend"})
"""Kinds of jobs that write a LoRA, which is called like the job."""


@dataclass(frozen=True)
class Wish:
    """A LoRA as asked for: ``pictures`` are ids of uploads."""

    pictures: Sequence[str]
    name: str
    model: str
    weights: Sequence[float] | None = None
    strength: float = 1.0
    rank: int | None = None
    dialect: str = ""
    dtype: str = ""
    subfolder: str = ""
    description: str = ""
    activation_text: str = ""


class Desk:
    """One for a WebUI process."""

    def __init__(self, host: Alone, state: Path | None = None, command: Sequence[str] | None = None) -> None:
        state = state or queue.state_folder()
        self.host = host
        self.uploads = Uploads(state / "uploads")
        self.uploads.sweep()
        self._state = state
        self.queue = Queue(
            state / "jobs", command, environment=self._environment, around=host.room, after=self._after, hide=self._hide
        )
        self._models: list[dict[str, Any]] | None = None
        self._asked: Job | None = None
        self._anew = False
        self.trouble: Job | None = None
        self._names = Recent(library.names_below, MOMENT)
        self._asking, self._naming = Lock(), Lock()  # requests come in many threads

    def look(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """What the engine sees in these uploads: ``{id, picture}`` or ``{id, error}``. It looks at new ones only."""
        paths = dict(zip(ids, self.uploads.paths(ids), strict=True))
        seen: dict[str, Any] = {id: {"picture": uri} for id in ids if (uri := self.uploads.preview(id))}
        if new := [id for id in paths if id not in seen]:
            found = self._look([list(ids).index(id) + 1 for id in new], [paths[id] for id in new])
            for id, one in zip(new, found, strict=True):
                seen[id] = one
                if "picture" in one:
                    self.uploads.keep_preview(id, one["picture"])
        return [{"id": id, **seen[id]} for id in ids]

    def _look(self, numbers: Sequence[int], paths: Sequence[Path]) -> Any:
        job = self.queue.submit("look", "", {"pictures": [str(path) for path in paths], "numbers": list(numbers)})
        try:
            self.queue.wait(job.id, PATIENCE)
        except TimeoutError:
            self.queue.cancel(job.id)
            raise UserError("Looking at the pictures takes too long. Remove some, or try again.") from None
        if job.state != "done":
            raise UserError(job.error or "The pictures could not be looked at. Try again.")
        return job.result

    def folder(self, subfolder: str = "") -> Path:
        """The LoRA folder, or one inside it. Raises UserError for anything else."""
        parts = [part for part in subfolder.replace("\\", "/").split("/") if part]
        if subfolder.strip().startswith(("/", "\\")) or len(parts) > 4:
            raise UserError("A sub-folder is a name or two, such as styles/mine; it lies inside the LoRA folder.")
        root = self.host.lora_folder()
        folder = root.joinpath(*map(names.check_name, parts))
        try:
            if root.resolve() not in (folder.resolve(), *folder.resolve().parents):
                raise UserError("That sub-folder leads out of the LoRA folder. Choose another one.")
        except RuntimeError:  # as Python before 3.13 has it
            raise UserError("That sub-folder is a link in a ring. Choose another one.") from None
        return folder

    def saved_name(self, name: str, subfolder: str = "") -> str:
        """What a LoRA of that name will be called, as far as it was known a moment ago. Raises UserError with a
        better one."""
        self.folder(subfolder)
        return self._free_name(name, self._names(self.host.lora_folder()))

    def _free_name(self, name: str, taken: Collection[str] | None = None) -> str:
        """The name, or one like it, that no LoRA has (``taken``: the files there are, if known) and that no job has
        been promised. Raises UserError with a better one."""
        name = names.check_name(name.strip())
        promised = {f"{job.title.lower()}.safetensors" for job in self.queue.active() if job.kind in WRITING}
        there = library.names_below(self.host.lora_folder()) if taken is None else taken
        return library.free_name(name, promised.union(there))

    def make(self, wish: Wish) -> Job:
        """Start making a LoRA."""
        if not wish.pictures:
            raise UserError("There is no picture yet. Drop at least one.")
        known = {row["name"] for row in self.models() or ()}
        if known and wish.model not in known:
            raise UserError(f"There is no model {wish.model[:80]!r}. There are: {', '.join(sorted(known))}.")
        if wish.dialect and wish.dialect not in DIALECTS:
            raise UserError(f"There are no key names {wish.dialect[:80]!r}. There are: {', '.join(DIALECTS)}.")
        if wish.dtype and wish.dtype not in DTYPES:
            raise UserError(f"There is no number format {wish.dtype[:80]!r}. There are: {', '.join(DTYPES)}.")
        if not 0 < abs(wish.strength) <= 10:
            raise UserError("The strength is a number up to 10, and not 0.")
        if wish.rank is not None and not 1 <= wish.rank <= 1024:
            raise UserError("The rank is a whole number from 1 to 1024.")
        if wish.weights is not None and len(wish.weights) != len(wish.pictures):
            raise UserError("Give one weight for each picture.")
        order = {
            "pictures": [str(path) for path in self.uploads.paths(wish.pictures)],
            "weights": None if wish.weights is None else [float(weight) for weight in wish.weights],
            "folder": str(self.folder(wish.subfolder).absolute()), "model": wish.model,
            "strength": float(wish.strength), "rank": wish.rank, "dtype": DTYPES.get(wish.dtype),
            "dialect": wish.dialect or self.host.option("i2l_dialect"),
            "description": wish.description[:4000], "activation_text": wish.activation_text[:1000],
            "host": self.host.name,
        }  # fmt: skip
        with self._naming:
            name = self._free_name(wish.name)
            return self.queue.submit("make", name, {"order": {**order, "name": name}, "draw": True, **self._engine()})

    def lora(self, shown: str) -> Path:
        """The LoRA that the list shows under this name. Raises UserError."""
        found = self.host.loras().get(shown)
        if found is None:
            raise UserError(f"There is no LoRA {str(shown)[:120]!r} in the folder. Reload the list.")
        return found

    def inspect(self, path: Path, name: str) -> Job:
        """Look into a LoRA: what it is, its plots, who loads it."""
        return self.queue.submit("inspect", name, {"file": str(path)})

    def curve(self, path: Path, name: str) -> Job:
        """How much of a LoRA each rank keeps."""
        return self.queue.submit("curve", name, {"file": str(path)})

    def mend(self, id: str, consumer: str) -> Job:
        """Write anew, so that ``consumer`` loads it, the LoRA that the job ``id`` made or looked into."""
        job = self.queue.find(id)
        if job is None or job.kind not in ("make", "inspect") or not (job.request.get("file") or job.result):
            raise UserError("That LoRA is no longer known. Inspect it again.")
        path = self.lora(job.result["file"]) if job.kind == "make" else Path(job.request.get("file") or "")
        if not path.is_file():
            raise UserError("That LoRA is no longer there. Inspect another one.")
        stem = names.clean_name(f"{Path(job.title).stem}-{consumer}")
        with self._naming:
            name = self._free_name(stem)
            targets = {"output": str(self.host.lora_folder() / f"{name}.safetensors"),
                       "folder_of_export": str(self._training(stem))}  # fmt: skip
            request = {"file": str(path), "consumer": consumer, **targets, **self._engine()}
            return self.queue.submit("mend", name, request)

    def doctor(self) -> Job:
        """What a bug report needs."""
        return self.queue.submit("doctor", "", {"host": self.host.title, **self._engine()})

    def convert(self, path: Path, name: str, dialect: str) -> Job:
        """Write a LoRA in another dialect, beside the others, under a fresh name."""
        if dialect not in DIALECTS:
            raise UserError(f"There are no key names {str(dialect)[:80]!r}. There are: {', '.join(DIALECTS)}.")
        stem = names.clean_name(f"{Path(name).stem}-{dialect}")
        with self._naming:
            stem = self._free_name(stem)
            output = self.host.lora_folder() / f"{stem}.safetensors"
            return self._command("convert", stem, "convert", path, "--to", dialect, "-o", output)

    def export(self, path: Path, name: str, trainer: str, rank: int) -> Job:
        """Write the folder from which a trainer starts."""
        if trainer not in TRAINERS:
            raise UserError(f"There is no trainer {str(trainer)[:80]!r}. There are: {', '.join(TRAINERS)}.")
        if not 1 <= int(rank) <= 1024:
            raise UserError("The rank is a whole number from 1 to 1024.")
        stem = names.clean_name(f"{Path(name).stem}-{trainer}-rank{int(rank)}")
        with self._naming:
            to = self._training(stem)
            return self._command("export", to.name, "export", path, "--for", trainer, "--rank", int(rank), "-o", to)

    def _training(self, stem: str) -> Path:
        """A folder that is not there yet and that no job has been promised, for a trainer to start from."""
        folder = self.host.lora_folder().absolute().parent / "i2l-training"
        active = self.queue.active()
        promised = {folder / job.title for job in active if job.kind == "export"}
        promised |= {Path(job.request["folder_of_export"]) for job in active if job.kind == "mend"}
        number = 1
        while (target := folder / (stem if number == 1 else f"{stem}-{number}")) in promised or target.exists():
            number += 1
        return target

    def models(self, *, anew: bool = False) -> list[dict[str, Any]] | None:
        """The models and what of them is here; None until that is known. Where it could not be found out ``trouble``
        says why, and it is tried again when they are asked for ``anew``."""
        with self._asking:
            self._anew |= anew  # also of a search that is under way: it may have been past what has changed
            if self._asked and self._asked.state in queue.ENDED:
                done = self._asked.state == "done"
                self._models = self._asked.result if done else self._models
                self.trouble, self._asked = None if done else self._asked, None
            if self._asked is None and (self._anew or (self._models is None and self.trouble is None)):
                with suppress(Busy):  # whoever asks next tries again
                    self._asked, self._anew = self.queue.submit("models", "", {}), False
            return self._models

    def chosen(self, *wanted: object) -> str:
        """The model to begin with: the first of ``wanted`` that there is, the settings', the first that is downloaded
        and ready, or the miniature."""
        rows = self.models() or ()
        names = [row["name"] for row in rows]
        real = [row["name"] for row in rows if row["ready"] and any(part["repo"] for part in row["parts"])]
        return next((name for name in (*wanted, self.host.option("i2l_model"), *real) if name in names), "mini")

    def download(self, name: str, source: str = "huggingface", *, agreed: bool = False) -> Job:
        """Fetch what a model lacks from a hub, once its licences are ``agreed`` to."""
        if source not in HUBS.values():
            raise UserError(f"There is no hub {str(source)[:80]!r}. There are: {', '.join(HUBS.values())}.")
        name = self._model(name)
        parts = [part for row in self.models() or () if row["name"] == name for part in lacking(row)]
        if parts and not agreed:
            licences = "; ".join(dict.fromkeys(part["licence"] for part in parts))
            raise UserError(f"{name}: agree to the licences before the download ({licences}).")
        return self.queue.submit("download", name, {"model": name, "source": source})

    def verify(self, name: str) -> Job:
        """Hold a model's files against the hub's checksums."""
        return self.queue.submit("verify", self._model(name), {"model": name})

    def _model(self, name: str) -> str:
        if name not in {row["name"] for row in self.models() or ()}:
            raise UserError(f"There is no model {str(name)[:80]!r}.")
        return name

    def _command(self, kind: str, title: str, *words: object) -> Job:
        return self.queue.submit(kind, title, {"arguments": [str(word) for word in words], **self._engine()})

    def _engine(self) -> dict[str, Any]:
        gigabytes = self.host.option("i2l_cache_gb")
        return {
            "device": self.host.option("i2l_device"),
            "precision": self.host.option("i2l_precision"),
            "memory": self.host.option("i2l_memory"),
            "cache_bytes": int(gigabytes * 10**9),
        }

    def _environment(self) -> Mapping[str, str]:
        named = [str(folder) for folder in self.host.models_folders()]
        return {"I2L_MODELS": os.pathsep.join(named)} if named else {}

    def _hide(self, job: Job) -> None:
        """No folder of this machine in what a client sees; where weights lie is told by the models' table alone."""
        if job.kind == "models":
            return
        loras = [folder.absolute() for folder in self.host.lora_folders()]
        known = [*loras, *(folder.parent for folder in loras), *self.host.models_folders(), self._state,
                 *redaction.own(), *upload_folders(),
                 *(Path(path).parent for path in [job.request.get("file")] if path)]  # fmt: skip
        job.result = redaction.hide(job.result, known)
        job.error, job.tail = (redaction.hide(value, known, others=True) for value in (job.error, job.tail))

    def _after(self, job: Job) -> None:
        if job.kind in WRITING and job.state == "done":
            self._names.forget()
            self.host.refresh()
        if job.kind in ("download", "verify", "make"):
            self.models(anew=job.kind != "make")


def lacking(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a model that are to be downloaded."""
    return [part for part in row["parts"] if part["repo"] and not part["present"]]


def picture_list(form: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    """Ids and weights of the page's tray. Raises UserError."""
    tray = form.get("pictures")
    if not isinstance(tray, list) or len(tray) > MOST_PICTURES:
        raise UserError(f"At most {MOST_PICTURES} pictures make one LoRA. Remove some.")
    ids, weights = [], []
    for entry in tray:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError("The list of pictures is damaged. Reload the page.")
        if isinstance(entry[1], bool) or not isinstance(entry[1], (int, float)) or not 0 < entry[1] <= 1000:
            raise UserError("A picture's weight is a number greater than 0.")
        ids.append(entry[0])
        weights.append(float(entry[1]))
    return ids, weights
