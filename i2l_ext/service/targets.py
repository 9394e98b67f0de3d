"""Names and folders for new files: inside the LoRA folder, and none given to two jobs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from threading import RLock

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.queue import Queue
from i2l_ext.library import folder as library
from i2l_ext.library import names
from i2l_ext.service.host import Host
from i2l_ext.service.short_cache import ShortCache

LISTING_SECONDS = 5.0
"""Seconds for which the names in the LoRA folder are taken to be unchanged while a name is typed."""

WRITES_LORA = frozenset({"make", "batch", "convert", "repair", "rank", "merge", "run"})
"""Kinds of jobs that write a LoRA, whose name is the job's title; of a batch they are ``names`` of its request."""

CHANGES_LIBRARY = WRITES_LORA | {"discard"}
"""Kinds of jobs after which the LoRA folder holds other files."""


class Targets:
    """Chooses where jobs write. Hold ``lock`` from the choice until the job is in the queue: requests come in many
    threads."""

    def __init__(self, host: Host, queue: Queue) -> None:
        self.lock = RLock()
        self._host, self._queue = host, queue
        self._names = ShortCache(library.names_below, LISTING_SECONDS)

    def folder(self, subfolder: str = "") -> Path:
        """The LoRA folder, or one inside it. Raises UserError for anything else."""
        parts = [part for part in subfolder.replace("\\", "/").split("/") if part]
        if subfolder.strip().startswith(("/", "\\")) or len(parts) > 4:
            raise UserError("A sub-folder is a name or two, such as styles/mine; it lies inside the LoRA folder.")
        root = self._host.lora_folder()
        folder = root.joinpath(*map(names.check_name, parts))
        try:
            if root.resolve() not in (folder.resolve(), *folder.resolve().parents):
                raise UserError("That sub-folder leads out of the LoRA folder. Choose another one.")
        except RuntimeError:  # Python before 3.13 raises it for a link in a ring
            raise UserError("That sub-folder is a link in a ring. Choose another one.") from None
        return folder

    def likely_name(self, name: str, subfolder: str = "") -> str:
        """What a LoRA of that name would be called, as far as is known from a moment ago. Raises UserError with a
        better name."""
        self.folder(subfolder)
        return self.free_name(name, self._names(self._host.lora_folder()))

    def likely_file(self, name: str, subfolder: str = "") -> str:
        """The file of the same, by its path below the LoRA folder."""
        folder = self.folder(subfolder).relative_to(self._host.lora_folder())
        return (folder / f"{self.likely_name(name)}.safetensors").as_posix()

    def free_name(self, name: str, existing: Collection[str] | None = None) -> str:
        """The name, or one like it, that no LoRA has and no job was given. ``existing``: names of the LoRAs there are;
        looked up unless given. Raises UserError with a better name."""
        return self.free_names([name], existing)[0]

    def free_names(self, wanted: Sequence[str], existing: Collection[str] | None = None) -> list[str]:
        """The same for several at once, all different."""
        active = [job for job in self._queue.active() if job.kind in WRITES_LORA]
        given = [name for job in active for name in job.request.get("names") or (job.title,)]
        there = library.names_below(self._host.lora_folder()) if existing is None else existing
        taken = {f"{name.lower()}.safetensors" for name in given}.union(there)
        free: list[str] = []
        for name in wanted:
            free.append(library.free_name(names.check_name(name.strip()), taken))
            taken.add(f"{free[-1].lower()}.safetensors")
        return free

    @property
    def start_folders(self) -> Path:
        """The folder that start folders are written into."""
        return self._host.lora_folder().absolute().parent / "i2l-training"

    def start_folder(self, stem: str) -> Path:
        """A folder for a trainer to start from, named like ``stem``, that is not there and no job was given."""
        folder, active = self.start_folders, self._queue.active()
        given = {folder / job.title for job in active if job.kind == "export"}
        given |= {Path(job.request["folder"]) for job in active if job.kind == "repair"}
        number = 1
        while (target := folder / (stem if number == 1 else f"{stem}-{number}")) in given or target.exists():
            number += 1
        return target

    def forget(self) -> None:
        """A LoRA was written: look the names up again."""
        self._names.clear()
