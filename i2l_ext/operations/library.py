"""The LoRA library: what lies in folders, read once and remembered, and the trash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext import converters, requests
from i2l_ext.converters import atomic
from i2l_ext.converters.errors import UserError, one_line
from i2l_ext.library import cards, trash
from i2l_ext.library.metadata import how_made
from i2l_ext.operations.context import Context, Step

if TYPE_CHECKING:
    from i2l_ext.converters.files import TensorFile

MAX_FILES = 5000
"""LoRAs of one folder that are listed."""

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class LibraryResult:
    """``rows``: of each LoRA, the newest first, ``file`` (its path within its folder), ``folder``, ``bytes``,
    ``modified`` (seconds since the epoch), ``preview`` (a path, or None) and what its header tells: ``arch``, ``model``
    (title), ``key_format``, ``rank``, ``modules``, ``loads`` ({program: status}), ``repairs`` (programs for which it
    can be repaired), and, of one that i2L has made, ``made`` (model, strength, images, options); or ``error``.
    ``read``: how many headers were read for it."""

    rows: Sequence[Mapping[str, Any]]
    read: int

    def json(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows], "read": self.read}


@dataclass(frozen=True)
class DiscardResult:
    """How many LoRAs were moved, and into which folders."""

    files: Sequence[str]
    folders: Sequence[Path]

    def json(self) -> dict[str, Any]:
        return {"files": list(self.files), "folders": [str(folder) for folder in self.folders]}


def list_library(request: requests.LibraryRequest, context: Context) -> LibraryResult:
    """The LoRAs of folders. A file that cannot be read is told, and stops nothing. Raises UserError for a folder that
    does not exist, Cancelled when the reporter says so."""
    rows: list[dict[str, Any]] = []
    read = 0
    context.reporter.plan([Step("library", "library")])
    context.reporter.begin("library")
    for folder in request.folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder.")
        memory = _Memory(folder)
        found = list(_files(folder))
        with memory:
            for number, (path, names) in enumerate(found, 1):
                context.reporter.check()
                with suppress(OSError):  # it went meanwhile
                    rows.append(_row(folder, path, names, memory))
                context.reporter.progress(number / len(found))
        read += memory.read
    rows.sort(key=lambda row: (-row["modified"], row["file"]))
    return LibraryResult(rows, read)


def discard_loras(request: requests.DiscardRequest, context: Context) -> DiscardResult:
    """Move LoRAs with what belongs to them into the trash. Raises UserError for a file that is no LoRA or cannot be
    moved; what was moved before is told by the reporter."""
    files = [path for path in request.files if path.suffix == SUFFIX and path.is_file()]
    if wrong := [path for path in request.files if path not in files]:
        raise UserError(f"{wrong[0].name}: is no LoRA file ({SUFFIX}). Nothing was moved.")
    folders: dict[Path, None] = {}
    for number, path in enumerate(files, 1):
        context.reporter.begin_saving()
        folders[trash.discard(cards.files_of(path))] = None
        context.reporter.end_saving(DiscardResult([one.name for one in files[:number]], list(folders)).json())
    return DiscardResult([path.name for path in files], list(folders))


def read_header(path: Path, judged: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """What the header of a LoRA tells. Raises UserError where it is no LoRA of a known model.

    ``judged`` has what was found of others, and gets it of this one: a folder of a thousand holds a few kinds of files.
    """
    from i2l_ext.converters.files import TensorFile

    with TensorFile(path) as file:
        metadata, kind = file.header.metadata, _kind_of_file(file)
    judged = {} if judged is None else judged
    if kind not in judged:
        judged[kind] = _judge(path)
    return {**judged[kind], "made": how_made(metadata)}


def _judge(path: Path) -> dict[str, Any]:
    """What every file of a kind is."""
    from i2l_ext.converters import consumers
    from i2l_ext.converters.files import TensorFile

    reading, verdicts = consumers.check(path)
    if reading.arch.caution:  # a program that knows its names has no model of its sizes
        verdicts = []
    with TensorFile(path) as file:
        ranks = sorted({file.info(slot.down).shape[0] for slot in reading.slots.values()})
    return {
        "arch": reading.arch.id, "model": reading.arch.title, "key_format": reading.key_format,
        "rank": "" if not ranks else f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
        "modules": len(reading.modules),
        "loads": {verdict.consumer.id: verdict.status for verdict in verdicts},
        "repairs": [verdict.consumer.id for verdict in verdicts if verdict.repair is not None],
    }  # fmt: skip


def _kind_of_file(file: TensorFile) -> str:
    """A digest of all that a verdict hangs on: names, dtypes, shapes, alphas and where else scales may stand."""
    from i2l_ext.converters.scales import ADAPTER_CONFIG, ADAPTER_METADATA

    tensors = file.header.tensors
    facts: list[Any] = [[name, entry.dtype, entry.shape] for name, entry in sorted(tensors.items())]
    facts += [repr(file.number(name)) for name in sorted(tensors) if name.endswith("alpha")]
    beside = file.path.with_name(ADAPTER_CONFIG)
    facts += [file.header.metadata.get(ADAPTER_METADATA), str(file.path) if beside.exists() else ""]
    return sha256(json.dumps(facts).encode(errors="replace")).hexdigest()


def _row(folder: Path, path: Path, names: set[str], memory: _Memory) -> dict[str, Any]:
    status = path.stat()
    name = path.relative_to(folder).as_posix()
    preview = cards.find_preview(path, names)
    return {
        "file": name, "folder": str(folder), "bytes": status.st_size, "modified": status.st_mtime,
        "preview": None if preview is None else str(preview), **memory.told(name, path, status),
    }  # fmt: skip


def _files(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """At most MAX_FILES LoRA files below a folder, each with the names in its own folder. Hidden ones are left out."""
    left = MAX_FILES
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        there = set(names)
        for name in sorted(names):
            if name.endswith(SUFFIX) and not name.startswith(".") and left:
                left -= 1
                yield Path(root, name), there


class _Memory:
    """What headers told, on disk, for files whose size and time of change are the same. Other code forgets it all."""

    def __init__(self, folder: Path) -> None:
        from i2l_ext.encoders.cache import EmbeddingCache

        shelf = EmbeddingCache.default().folder.parent / "library"
        self._path = shelf / f"{sha256(str(folder.resolve()).encode(errors='replace')).hexdigest()[:32]}.json"
        self._code = _code()
        self._kept: dict[str, Any] = {}
        self._told: dict[str, Any] = {}
        self._judged: dict[str, dict[str, Any]] = {}
        self.read = 0
        with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
            kept = json.loads(self._path.read_bytes())
            self._kept = kept["files"] if kept.get("code") == self._code and isinstance(kept["files"], dict) else {}

    def told(self, name: str, path: Path, status: os.stat_result) -> dict[str, Any]:
        """What the header of a file tells, or ``{error: line}``."""
        stamp = [status.st_size, status.st_mtime_ns]
        kept = self._kept.get(name)
        if not (isinstance(kept, list) and len(kept) == 2 and kept[0] == stamp and isinstance(kept[1], dict)):
            self.read += 1
            try:
                kept = [stamp, read_header(path, self._judged)]
            except UserError as error:
                kept = [stamp, {"error": one_line(str(error))}]
        self._told[name] = kept
        return dict(kept[1])

    def __enter__(self) -> None:
        pass

    def __exit__(self, stopped: type[BaseException] | None, *rest: object) -> None:
        """Write it down, where something is new. A disk that refuses only makes the next time slower."""
        told = self._told if stopped is None else {**self._kept, **self._told}
        if self.read or len(told) < len(self._kept):
            with suppress(OSError, ValueError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                atomic.replace_text(self._path, json.dumps({"code": self._code, "files": told}))


def _code() -> str:
    """A digest of the code that reads headers and judges them."""
    digest = sha256()
    for file in sorted(Path(converters.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
