"""The LoRA library of the tab: its rows, what is shown of them, and jobs on several LoRAs at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from i2l_ext.converters.consumers import CONSUMERS
from i2l_ext.converters.errors import UserError
from i2l_ext.engine.job import ENDED, Job
from i2l_ext.engine.queue import MAX_WAITING
from i2l_ext.library import cards, names
from i2l_ext.requests import (
    CENTRE,
    ConvertRequest,
    DiscardRequest,
    LibraryRequest,
    MergeRequest,
    PreviewRequest,
    RankRequest,
    RepairRequest,
    Request,
)
from i2l_ext.requests.fields import option
from i2l_ext.service.targets import CHANGES_LIBRARY

if TYPE_CHECKING:
    from i2l_ext.service.service import Service

PROGRAMS = tuple(consumer.id for consumer in CONSUMERS)

PER_PAGE = 24
THUMBNAIL_SECONDS = 30.0
"""For which a page waits for the previews of its LoRAs; it is shown without those that take longer."""

SORTS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "newest": lambda row: -row["modified"],
    "name": lambda row: row["file"].casefold(),
    "largest": lambda row: -row["bytes"],
    "rank": lambda row: -int(str(row.get("rank") or "0").split("-")[-1]),
}
"""By the word of WORDS ``sort_<name>``."""


@dataclass(frozen=True)
class View(Request):
    """What of the library is shown. ``page`` counts from 0."""

    kind: ClassVar[str] = "view"

    text: str = option("words in the name, model or key format, all of which a LoRA is to have", "")
    arch: str = option("only LoRAs for the model with this id (`arch` of a row)", "")
    loads: str = option("only LoRAs that this program loads whole", "", choices=("", *PROGRAMS))
    sort: str = option("the order", "newest", choices=tuple(SORTS))
    page: int = option("the page, from 0", 0, minimum=0)

    def matches(self, row: Mapping[str, Any]) -> bool:
        said = " ".join(str(row.get(key, "")) for key in ("file", "model", "key_format", "error")).casefold()
        fits = all(word in said for word in self.text.casefold().split())
        loaded = not self.loads or row.get("loads", {}).get(self.loads) == "all"
        return fits and loaded and self.arch in ("", row.get("arch"))


class Library:
    """The LoRAs of the host's folders, read by the engine. ``view`` is what a page was shown last."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._job: Job | None = None
        self._rows: list[dict[str, Any]] | None = None
        self._stale = True
        self._ended: frozenset[str] = frozenset()
        self._files: object = None
        """What lay in the folders when they were read last."""
        self._thumbnails: dict[tuple[str, int], str | None] = {}
        self.view = View()

    @property
    def job(self) -> Job | None:
        """The job that lists them, or has listed them."""
        return self._job

    def refresh(self) -> None:
        """LoRAs were added or taken away, and not by a job: look again when somebody asks."""
        self._stale = True

    def rows(self) -> list[dict[str, Any]] | None:
        """The rows of LibraryResult as they are known; None while they are read for the first time."""
        before, self._ended = self._ended, self._service.queue.ended(CHANGES_LIBRARY)
        self._stale |= not self._ended <= before
        if self._stale and (self._job is None or self._job.state in ENDED):
            self._stale, self._files = False, self._files_now()
            folders = tuple(folder for folder in self._service.host.lora_folders() if folder.is_dir())
            if not folders:
                return []
            self._job = self._service.queue.submit("library", "", {"request": LibraryRequest(folders).json()})
        if self._job is not None and self._job.state == "done":
            self._rows = self._job.result["rows"]
        return self._rows

    def wait_for_rows(self, timeout: float) -> list[dict[str, Any]]:
        """The rows as they are now. Raises UserError where they cannot be read, or not in ``timeout`` seconds."""
        if self._files_now() != self._files:
            self.refresh()
        end = time.monotonic() + timeout
        while (rows := self.rows()) is None or (self._job is not None and self._job.state not in ENDED):
            if self._job is None or self._job.state in ENDED:
                why = self._job.error if self._job else None
                raise UserError(why or "The LoRAs could not be listed. Ask again.", "not_ready")
            try:
                self._service.queue.wait(self._job.id, max(end - time.monotonic(), 0))
            except TimeoutError:
                raise UserError("The LoRAs are being looked for. Ask again in a few seconds.", "not_ready") from None
        return rows

    def _files_now(self) -> object:
        found = set()
        for root in self._service.host.lora_folders():
            for folder, _, files in os.walk(root):
                for path in (Path(folder, name) for name in files):
                    with suppress(OSError):  # it went meanwhile
                        found.add((str(path), path.stat().st_mtime_ns, path.stat().st_size))
        return found

    def find(self, view: View) -> tuple[list[dict[str, Any]], int, View]:
        """The rows of the page that is viewed, how many match, and the view with a page that there is."""
        found = sorted(filter(view.matches, self.rows() or ()), key=SORTS[view.sort])
        last = max(len(found) - 1, 0) // PER_PAGE
        view = replace(view, page=min(max(view.page, 0), last))
        start = view.page * PER_PAGE
        return found[start : start + PER_PAGE], len(found), view

    def shown(self) -> tuple[list[dict[str, Any]], int]:
        """``find`` for the view of the page, whose page may change."""
        rows, count, self.view = self.find(self.view)
        return rows, count

    def thumbnails(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
        """Data URIs of the previews of rows, by file, of those that have one. New ones are asked of the engine."""
        paths = self._service.loras()
        stamped: dict[str, tuple[str, int]] = {}
        for row in rows:
            file = paths.get(row["file"])
            preview = cards.find_preview(file) if file is not None and row.get("preview") else None
            if preview is not None:
                with suppress(OSError):
                    stamped[row["file"]] = (str(preview.absolute()), preview.stat().st_mtime_ns)
        new = [stamp for stamp in stamped.values() if stamp not in self._thumbnails]
        if new:
            request = PreviewRequest(tuple(Path(path) for path, _ in new))
            job = self._service.queue.submit("look", "", {"request": request.json()})
            with suppress(TimeoutError):
                self._service.queue.wait(job.id, THUMBNAIL_SECONDS)
            if job.state == "done":
                self._thumbnails |= {stamp: one.get("picture") for stamp, one in zip(new, job.result, strict=True)}
        return {file: self._thumbnails.get(stamp) for file, stamp in stamped.items()}

    def convert(self, files: Sequence[str], key_format: str, **values: Any) -> list[Job]:
        """Write each in another key format. ``values``: other fields of a ConvertRequest."""
        return self._each(files, key_format, lambda path, output: ConvertRequest(path, key_format, output, **values))

    def repair(self, files: Sequence[str], consumer: str) -> list[Job]:
        """Write each anew so that a program loads it. Those that it loads, or that nothing helps, are left out; raises
        UserError where that are all of them."""
        repairable = {row["file"] for row in self.rows() or () if consumer in row.get("repairs", ())}
        wanted = [file for file in files if file in repairable]
        if files and not wanted:
            raise UserError(
                "There is nothing to repair: that program loads these as they are, or cannot run them at all."
            )
        folder = self._service.targets.start_folder
        return self._each(
            wanted, consumer, lambda path, output: RepairRequest(path, consumer, output, folder(output.stem))
        )

    def resize(self, files: Sequence[str], rank: int | None = None, **values: Any) -> list[Job]:
        """Write each at another rank. ``values``: other fields of a RankRequest, such as ``effect_kept``."""
        end = f"r{rank}" if rank else f"effect{values.get('effect_kept') or 0:g}"
        return self._each(files, end, lambda path, output: RankRequest(path, rank, output=output, **values))

    def merge(self, files: Sequence[str], weights: Mapping[str, float], **values: Any) -> Job:
        """One LoRA of several; a weight that is not given is 1. ``values``: other fields of a MergeRequest."""
        if len(files) < 2:
            raise UserError("Choose at least two LoRAs to merge.")
        parts = tuple(f"{self._service.lora(file)}:{weights.get(file, 1.0)!r}" for file in files)
        stem = names.clean_name("-".join(Path(file).stem for file in files)[: names.LONGEST // 2] + "-merged")
        return self._write(stem, lambda output: MergeRequest(parts, output=output, **values))

    def discard(self, files: Sequence[str]) -> Job:
        """Move them into the trash."""
        request = DiscardRequest(tuple(self._service.lora(file) for file in _some(files)))
        return self._service.submit(", ".join(Path(file).stem for file in files)[:200], request)

    def make_anew(self, files: Sequence[str]) -> list[Job]:
        """Make each again from its pictures, with the weights and options that it remembers."""
        made = {row["file"]: row.get("made") for row in self.rows() or ()}
        if strange := [file for file in _some(files) if not made.get(file)]:
            raise UserError(f"{strange[0]} does not say how it was made: only LoRAs of this extension do.")
        self._check_room(files)
        return [self._make_anew(file, made[file] or {}) for file in files]

    def _make_anew(self, file: str, made: Mapping[str, Any]) -> Job:
        images = made["images"]
        try:
            self._service.uploads.paths([one["sha256"] for one in images])
        except UserError:
            raise UserError(
                f"{file}: its pictures are no longer here; they are kept for a week. Drop them again, and make it."
            ) from None
        return self._service.make(
            [one["sha256"] for one in images], name=Path(file).stem, model=made["model"], strength=made["strength"],
            weights=tuple(one["weight"] for one in images), crops=tuple(one.get("crop", CENTRE) for one in images),
            **made["options"],
        )  # fmt: skip

    def _each(self, files: Sequence[str], end: str, request: Callable[[Path, Path], Request]) -> list[Job]:
        self._check_room(_some(files))
        paths = [(self._service.lora(file), names.clean_name(f"{Path(file).stem}-{end}")) for file in files]
        return [self._write(stem, lambda output, path=path: request(path, output)) for path, stem in paths]  # type: ignore[misc]

    def _write(self, stem: str, request: Callable[[Path], Request]) -> Job:
        with self._service.targets.lock:
            free = self._service.targets.free_name(stem)
            asked = request(self._service.host.lora_folder() / f"{free}.safetensors")
            asked.validate()
            job = self._service.submit(free, asked)
        self._service.panes[job.id] = "library"
        return job

    def _check_room(self, files: Sequence[str]) -> None:
        left = MAX_WAITING - sum(job.state == "waiting" for job in self._service.queue.active())
        if len(files) > left:
            raise UserError(
                f"{len(files)} jobs are too many at once: {left} more may wait. Choose fewer LoRAs.", "busy"
            )


def _some(files: Sequence[str]) -> Sequence[str]:
    if not files:
        raise UserError("Choose at least one LoRA: tick it.")
    return files
