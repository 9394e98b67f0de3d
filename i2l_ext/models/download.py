"""Downloads model files from a hub into our own folder, as ``<folder>/<repo>/<file>``.

A file grows under a hidden name with its checksum, so that the next run resumes where a broken connection, a stop or a
full disk ended this one. It gets its own name once it is whole and the checksum is right.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TypeVar

from i2l_ext.converters.atomic import atomic_path, place
from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.models.catalogue import Checkpoint, I2LModel
from i2l_ext.models.hubs import BROKEN, Hub, RemoteFile, explain
from i2l_ext.models.store import INDEX, Folders, gigabytes, locate, note_path, read_note, shapes_of, shards
from i2l_ext.weights.structure import check_structure

Result = TypeVar("Result")

RESERVE = 64 << 20
"""Bytes that are left free on the disk."""

READ_SIZE = 8 << 20
"""Bytes read between two checks for cancellation."""

POLL_SECONDS = 0.1
"""Between two checks for cancellation, and between two reports of progress."""

RETRY_SECONDS = 1.0
"""Between a broken connection and the next try."""

MAX_EMPTY = 3
"""Connections in a row without a new byte, after which a download ends with an error."""

CODE = "model.py"
TEMPLATE_SUFFIXES = (".py", ".safetensors", ".json", ".txt", ".model", "LICENSE", "NOTICE")
TEMPLATE_FILES = 200
"""Of a template's repository: its code, what is fetched, and how many files at most."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done, and all bytes."""


def _silent(phase: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class DownloadCallbacks:
    """Who is told how far a download is, and who may stop it. Both are called on the caller's thread."""

    progress: Progress = _silent
    cancelled: Callable[[], bool] = lambda: False

    def check(self) -> None:
        """Raises Cancelled when the user wants to stop."""
        if self.cancelled():
            raise Cancelled


class DeliveryError(UserError):
    """The hub did not deliver a file. ``lasting``: trying again at once does not help."""

    def __init__(self, hub: Hub, repo: str, file: str, reason: str, lasting: bool = False) -> None:
        super().__init__(f"{hub.name} did not deliver {file} of {repo}: {reason}.")
        self.lasting = lasting


def missing(model: I2LModel, folders: Folders) -> list[Checkpoint]:
    """The checkpoints that must be downloaded. A damaged file counts as missing."""

    def is_here(part: Checkpoint) -> bool:
        try:
            return locate(part, folders) is not None
        except UserError:
            return False

    parts = {part.id: part for part in model.parts if part.repo}
    return [part for part in parts.values() if not is_here(part)]


def _is_inside(name: str) -> bool:
    """Whether a name that a hub lists stays in its folder, on every system."""
    parts = name.split("/")
    return not set(name) & set('\\:\0*?"<>|') and all(part and not part.startswith(".") for part in parts)


def notes(parts: Sequence[Checkpoint]) -> list[str]:
    """What to agree to before a download: a line for each part, with its size, its origin and its licence."""
    return [f"{part.id}: {gigabytes(part.nbytes)} from {part.repo}. Licence: {part.licence}" for part in parts]


def download(
    parts: Sequence[Checkpoint], hub: Hub, folder: Path, callbacks: DownloadCallbacks | None = None
) -> list[Path]:
    """Fetch the files of ``parts`` into ``folder``; their paths.

    Raises UserError for what the user can mend (no connection, no permission, a full disk, wrong bytes), Cancelled
    within a second. What was fetched until then is used by the next run.
    """
    fetching = _Download(hub, folder, callbacks or DownloadCallbacks())
    remotes = [remote for part in parts for remote in fetching.files(part)]
    fetching.check_space(remotes)
    return [fetching.obtain(remote) for remote in remotes]


@dataclass(frozen=True)
class _Download:
    hub: Hub
    folder: Path
    callbacks: DownloadCallbacks

    def files(self, part: Checkpoint) -> Iterator[RemoteFile]:
        """The files of a checkpoint. An index is fetched at once, since it names others."""
        if part.repo is None:
            raise ValueError(f"{part.id} is shipped")
        for file in self.names(part, part.repo):
            remote = self.describe(part.repo, file)
            yield remote
            if file.endswith(INDEX):
                inner = file.removesuffix(Path(file).name)
                for shard in shards(self.obtain(remote)):
                    yield self.describe(part.repo, inner + shard.name)

    def names(self, part: Checkpoint, repo: str) -> Sequence[str]:
        """The exact names of a checkpoint's files. Those of a template are what its repository lists now, without
        pictures and the like; its code, by which it is found later, is the last."""
        if part.kind != "template":
            return part.files
        with self.explained(repo, CODE):
            listed = _interruptible(lambda stop: self.hub.names(repo), self.callbacks)
        names = [name for name in listed if name.endswith(TEMPLATE_SUFFIXES)]
        if len(names) > TEMPLATE_FILES or not all(_is_inside(name) for name in names) or CODE not in names:
            raise UserError(f"{repo}: {self.hub.name} lists no {CODE}, or more and other files than a template has.")
        return sorted(names, key=lambda name: (name == CODE, name))

    def describe(self, repo: str, file: str) -> RemoteFile:
        with self.explained(repo, file):
            return _interruptible(lambda stop: self.hub.describe(repo, file), self.callbacks)

    def final(self, remote: RemoteFile) -> Path:
        return self.folder / remote.repo / remote.file

    def part(self, remote: RemoteFile) -> Path:
        final = self.final(remote)
        return final.with_name(f".{final.name}.{remote.digest[:16]}.part")

    def check_space(self, remotes: Sequence[RemoteFile]) -> None:
        """Raises UserError where the disk has not enough space for what is missing."""
        lacking = [remote for remote in remotes if not self.final(remote).exists()]
        due = sum(max(remote.size - _size(self.part(remote)), 0) for remote in lacking)
        home = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(home).free
        if due and free < due + RESERVE:
            raise UserError(
                f"{self.folder}: {gigabytes(due)} are to be downloaded, but only {gigabytes(free)} are free. "
                "Make room, or choose another folder with --to."
            )

    def obtain(self, remote: RemoteFile) -> Path:
        """The file under its own name. It is fetched unless it is there, and checked."""
        final, part = self.final(remote), self.part(remote)
        if final.exists():
            if final.stat().st_size != remote.size or digest(final, remote.digest, self.callbacks) != remote.digest:
                raise UserError(f"{final}: is not the file that {self.hub.name} has. Move it away or delete it.")
            self.note(remote, final)
            return final
        with _writing(part.parent):
            part.parent.mkdir(parents=True, exist_ok=True)
        self.complete(remote, part)
        if digest(part, remote.digest, self.callbacks) != remote.digest:
            part.unlink()
            raise UserError(
                f"{remote.file}: what came from {self.hub.name} is not what its checksum says, and was thrown away. "
                "Try again, or take the other hub with --from."
            )
        self.note(remote, part)
        with _writing(part.parent):
            place(part, final, overwrite=False)
            for stale in final.parent.glob(f".{final.name}.*.part*"):
                with suppress(OSError):  # another version's, still being fetched on Windows
                    stale.unlink()
        return final

    def complete(self, remote: RemoteFile, part: Path) -> None:
        """Fetch the rest of ``part``, over as many connections as that takes."""
        empty = 0
        while not part.exists() or _size(part) != remote.size:
            self.callbacks.check()
            before = _size(part)
            try:
                with self.explained(remote.repo, remote.file):
                    _interruptible(
                        lambda stop: self.transfer(remote, part, stop), self.callbacks, self.report(remote, part)
                    )
            except DeliveryError as broken:
                empty = 0 if _size(part) > before else empty + 1
                if broken.lasting or empty == MAX_EMPTY:
                    raise
                _interruptible(lambda stop: stop.wait(RETRY_SECONDS), self.callbacks)

    def transfer(self, remote: RemoteFile, part: Path, stop: Event) -> None:
        """Fetch over one connection, on a thread of its own."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(f"{part}.lock", blocking=False), _Sink(part, remote.size, stop) as sink:
                self.hub.fetch(remote, sink, sink.tell())
                if sink.tell() < remote.size:
                    raise DeliveryError(self.hub, remote.repo, remote.file, BROKEN)
        except Timeout:
            raise UserError(f"{remote.file}: is being downloaded by another run. Wait for it, or stop it.") from None
        except OSError as error:
            if error.filename is None:  # of the network: the client library's
                raise
            raise _refused(part.parent, error) from None

    def report(self, remote: RemoteFile, part: Path) -> Callable[[], None]:
        return lambda: self.callbacks.progress(f"download {remote.file}", _size(part), remote.size)

    def note(self, remote: RemoteFile, measured: Path) -> None:
        """Write down beside the file what the hub says of it. ``measured``: the file, perhaps under its hidden name."""
        if len(remote.digest) != 64:
            return
        status = measured.stat()
        noted = {
            "sha256": remote.digest, "size": status.st_size, "mtime_ns": status.st_mtime_ns,
            "source": self.hub.name, "repo": remote.repo, "file": remote.file, "revision": remote.revision,
        }  # fmt: skip
        with atomic_path(note_path(self.final(remote)), overwrite=True) as path:
            path.write_text(json.dumps(noted, indent=1), encoding="utf-8")

    @contextmanager
    def explained(self, repo: str, file: str) -> Iterator[None]:
        """Turn errors of the client library into one line."""
        try:
            yield
        except (UserError, Cancelled):
            raise
        except Exception as error:
            problem = explain(error)
            if problem is None:
                raise
            raise DeliveryError(self.hub, repo, file, problem.text, problem.lasting) from error


class _Sink(io.FileIO):
    """Appends to a growing file. Raises Cancelled once ``stop`` is set, and UserError where the disk refuses. Where
    more comes than was announced, as from a hub that starts again unasked, it empties the file: ConnectionError."""

    def __init__(self, path: Path, limit: int, stop: Event) -> None:
        super().__init__(path, "ab")
        self.path, self.limit, self.stop = path, limit, stop

    def write(self, chunk: bytes) -> int:  # type: ignore[override]
        if self.stop.is_set():
            raise Cancelled
        if self.tell() + len(chunk) > self.limit:
            self.seek(0)
            self.truncate()
            raise ConnectionError("more came than was announced")
        rest = memoryview(chunk)
        with _writing(self.path.parent):
            while rest:
                rest = rest[super().write(rest) :]
        return len(chunk)


def digest(path: Path, like: str, callbacks: DownloadCallbacks) -> str:
    """The checksum of a file, of the same kind as ``like``: sha256 or git's sha1. Raises Cancelled."""
    total, done = path.stat().st_size, 0
    sha = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % total, usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(READ_SIZE):
            callbacks.check()
            sha.update(piece)
            done += len(piece)
            callbacks.progress(f"check {path.name}", done, total)
    return sha.hexdigest()


def verify(part: Checkpoint, paths: Sequence[Path], callbacks: DownloadCallbacks | None = None) -> str:
    """Check files by the hub's checksums, where they are known, and by our own modules; what was checked, as text.

    Raises UserError that names what is wrong, Cancelled when the user wants to stop.
    """
    checked = []
    for path in paths:
        noted = read_note(path).get("sha256")
        if isinstance(noted, str):
            if digest(path, noted, callbacks or DownloadCallbacks()) != noted:
                raise UserError(f"{path}: has changed since it was downloaded. Delete it and download it again.")
            checked.append(path)
    if part.kind == "template":
        return "checksum" if checked == list(paths) else "nothing (no checksum is known)"
    shapes = shapes_of(paths)
    if part.kind != "bias":
        check_structure(paths[0].name, part.shapes, shapes)
    whole = "checksum and structure" if checked == list(paths) else "structure (no checksum is known)"
    return whole if part.kind != "bias" else whole.replace("structure", "format")


def _interruptible(
    work: Callable[[Event], Result], callbacks: DownloadCallbacks, report: Callable[[], None] = lambda: None
) -> Result:
    """The result of ``work``, run on another thread. When the user wants to stop, that thread is abandoned, since a
    client library may wait minutes for the network; the event tells it to end as soon as it can."""
    answer: Future[Result] = Future()
    stop = Event()

    def run() -> None:
        try:
            answer.set_result(work(stop))
        except BaseException as error:  # noqa: BLE001 - it is raised again on the caller's thread
            answer.set_exception(error)

    Thread(target=run, name="i2l-download", daemon=True).start()
    try:
        while not wait([answer], timeout=POLL_SECONDS).done:
            callbacks.check()
            report()
    finally:
        stop.set()
    return answer.result()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refused(folder, error) from None


def _refused(folder: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{folder}: the disk is full. Make room; the next run goes on where this one stopped.")
    return UserError(f"{folder}: cannot be written to ({error.strerror}). Choose another folder with --to.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
