"""Weights from a hub into our own folder, as ``<folder>/<repo>/<file>``.

A file grows under a hidden name that holds its checksum, so that the next run goes on where a cut, a stop or a full
disk ended this one. It gets its own name only when it is whole and the checksum is right.
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
from i2l_ext.models.catalogue import Checkpoint, Model
from i2l_ext.models.hubs import BROKEN, Hub, Remote, explain
from i2l_ext.models.store import INDEX, Folders, gigabytes, locate, note_of, shapes_of, shards, sidecar
from i2l_ext.weights.structure import check_structure

Result = TypeVar("Result")

RESERVE = 64 << 20
"""Bytes that are left free on the disk."""

PIECE = 8 << 20
"""Bytes read between two looks at whether to stop."""

BEAT = 0.1
"""Seconds between two looks at whether to stop, and between two words on the progress."""

PAUSE = 1.0
"""Seconds before a broken connection is tried anew."""

BARREN = 3
"""Connections in a row that bring nothing, after which a download is given up until the next run."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many bytes of how many are done."""


def _silent(phase: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Job:
    """How one works on large files: who listens, and who may stop it. Both are called on the caller's thread."""

    progress: Progress = _silent
    cancel: Callable[[], bool] = lambda: False

    def check(self) -> None:
        """Raises Cancelled when the user wants to stop."""
        if self.cancel():
            raise Cancelled


class Undelivered(UserError):
    """The hub did not give what it was asked for. ``lasting``: asking again at once is of no use."""

    def __init__(self, hub: Hub, repo: str, file: str, reason: str, lasting: bool = False) -> None:
        super().__init__(f"{hub.name} did not deliver {file} of {repo}: {reason}.")
        self.lasting = lasting


def missing(model: Model, folders: Folders) -> list[Checkpoint]:
    """The parts that are to be downloaded: neither here nor shipped. A damaged file counts as missing."""

    def is_here(part: Checkpoint) -> bool:
        try:
            return locate(part, folders) is not None
        except UserError:
            return False

    parts = {part.id: part for part in model.parts if part.repo}
    return [part for part in parts.values() if not is_here(part)]


def notes(parts: Sequence[Checkpoint]) -> list[str]:
    """What to agree to before a download: a line for each part, with its size, its origin and its licence."""
    return [f"{part.id}: {gigabytes(part.nbytes)} from {part.repo}. Licence: {part.licence}" for part in parts]


def download(parts: Sequence[Checkpoint], hub: Hub, folder: Path, job: Job | None = None) -> list[Path]:
    """Fetch the files of ``parts`` into ``folder``; where they lie then.

    Raises UserError for what the user can mend: no connection, no leave, no room, wrong bytes; Cancelled within a
    second of the user's word. What was fetched until then is used by the next run.
    """
    fetching = _Download(hub, folder, job or Job())
    remotes = [remote for part in parts for remote in fetching.files(part)]
    fetching.check_room(remotes)
    return [fetching.obtain(remote) for remote in remotes]


@dataclass(frozen=True)
class _Download:
    hub: Hub
    folder: Path
    job: Job

    def files(self, part: Checkpoint) -> Iterator[Remote]:
        """The files of a checkpoint; an index is fetched at once, for it names others."""
        if part.repo is None:
            raise ValueError(f"{part.id} is shipped")
        for file in part.files:
            remote = self.look(part.repo, file)
            yield remote
            if file.endswith(INDEX):
                inner = file.removesuffix(Path(file).name)
                for shard in shards(self.obtain(remote)):
                    yield self.look(part.repo, inner + shard.name)

    def look(self, repo: str, file: str) -> Remote:
        with self.told(repo, file):
            return _abandonable(lambda stop: self.hub.look(repo, file), self.job)

    def final(self, remote: Remote) -> Path:
        return self.folder / remote.repo / remote.file

    def part(self, remote: Remote) -> Path:
        final = self.final(remote)
        return final.with_name(f".{final.name}.{remote.digest[:16]}.part")

    def check_room(self, remotes: Sequence[Remote]) -> None:
        """Raises UserError where the disk has not room for what is still to come."""
        lacking = [remote for remote in remotes if not self.final(remote).exists()]
        due = sum(max(remote.size - _size(self.part(remote)), 0) for remote in lacking)
        home = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(home).free
        if due and free < due + RESERVE:
            raise UserError(
                f"{self.folder}: {gigabytes(due)} are to be downloaded, but only {gigabytes(free)} are free. "
                "Make room, or choose another folder with --to."
            )

    def obtain(self, remote: Remote) -> Path:
        """The file under its own name, fetched and checked unless it is there already."""
        final, part = self.final(remote), self.part(remote)
        if final.exists():
            if final.stat().st_size != remote.size or digest(final, remote.digest, self.job) != remote.digest:
                raise UserError(f"{final}: is not the file that {self.hub.name} has. Move it away or delete it.")
            self.note(remote, final)
            return final
        with _writing(part.parent):
            part.parent.mkdir(parents=True, exist_ok=True)
        self.complete(remote, part)
        if digest(part, remote.digest, self.job) != remote.digest:
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

    def complete(self, remote: Remote, part: Path) -> None:
        """Let ``part`` grow to its size, over as many connections as that takes."""
        barren = 0
        while not part.exists() or _size(part) != remote.size:
            self.job.check()
            before = _size(part)
            try:
                with self.told(remote.repo, remote.file):
                    _abandonable(lambda stop: self.transfer(remote, part, stop), self.job, self.beat(remote, part))
            except Undelivered as broken:
                barren = 0 if _size(part) > before else barren + 1
                if broken.lasting or barren == BARREN:
                    raise
                _abandonable(lambda stop: stop.wait(PAUSE), self.job)

    def transfer(self, remote: Remote, part: Path, stop: Event) -> None:
        """One connection's worth, on a thread of its own."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(f"{part}.lock", blocking=False), _Sink(part, remote.size, stop) as sink:
                self.hub.fetch(remote, sink, sink.tell())
                if sink.tell() < remote.size:
                    raise Undelivered(self.hub, remote.repo, remote.file, BROKEN)
        except Timeout:
            raise UserError(f"{remote.file}: is being downloaded by another run. Wait for it, or stop it.") from None
        except OSError as error:
            if error.filename is None:  # of the network: the client library's
                raise
            raise _refused(part.parent, error) from None

    def beat(self, remote: Remote, part: Path) -> Callable[[], None]:
        return lambda: self.job.progress(f"download {remote.file}", _size(part), remote.size)

    def note(self, remote: Remote, measured: Path) -> None:
        """Keep beside the file what the hub says of it. ``measured`` is the file, or what is about to be."""
        if len(remote.digest) != 64:
            return
        status = measured.stat()
        noted = {
            "sha256": remote.digest, "size": status.st_size, "mtime_ns": status.st_mtime_ns,
            "source": self.hub.name, "repo": remote.repo, "file": remote.file, "revision": remote.revision,
        }  # fmt: skip
        with atomic_path(sidecar(self.final(remote)), overwrite=True) as path:
            path.write_text(json.dumps(noted, indent=1), encoding="utf-8")

    @contextmanager
    def told(self, repo: str, file: str) -> Iterator[None]:
        """Errors of the client library become one line."""
        try:
            yield
        except (UserError, Cancelled):
            raise
        except Exception as error:
            trouble = explain(error)
            if trouble is None:
                raise
            raise Undelivered(self.hub, repo, file, trouble.text, trouble.lasting) from error


class _Sink(io.FileIO):
    """The end of a growing file. Raises Cancelled once ``stop`` is set, and UserError where the disk refuses. Where
    more comes than was announced, as from a hub that begins anew unasked, it empties itself: ConnectionError."""

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


def digest(path: Path, like: str, job: Job) -> str:
    """The checksum of a file, of the kind that ``like`` is: sha256, or git's sha1. Raises Cancelled."""
    total, done = path.stat().st_size, 0
    sha = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % total, usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            job.check()
            sha.update(piece)
            done += len(piece)
            job.progress(f"check {path.name}", done, total)
    return sha.hexdigest()


def verify(part: Checkpoint, paths: Sequence[Path], job: Job | None = None) -> str:
    """Hold files against the hub's checksums, where they are known, and against our own modules; what was held.

    Raises UserError that names what is wrong, Cancelled when the user says stop.
    """
    held = []
    for path in paths:
        noted = note_of(path).get("sha256")
        if isinstance(noted, str):
            if digest(path, noted, job or Job()) != noted:
                raise UserError(f"{path}: has changed since it was downloaded. Delete it and download it again.")
            held.append(path)
    shapes = shapes_of(paths)
    if part.kind != "bias":
        check_structure(paths[0].name, part.shapes, shapes)
    whole = "checksum and structure" if held == list(paths) else "structure (no checksum is known)"
    return whole if part.kind != "bias" else whole.replace("structure", "format")


def _abandonable(work: Callable[[Event], Result], job: Job, beat: Callable[[], None] = lambda: None) -> Result:
    """What ``work`` gives. It runs on a thread that is left to itself when the user says stop, since a client library
    may wait for the network for minutes; the event tells it to end as soon as it can."""
    answer: Future[Result] = Future()
    stop = Event()

    def run() -> None:
        try:
            answer.set_result(work(stop))
        except BaseException as error:  # noqa: BLE001 - it is raised again on the caller's thread
            answer.set_exception(error)

    Thread(target=run, name="i2l-download", daemon=True).start()
    try:
        while not wait([answer], timeout=BEAT).done:
            job.check()
            beat()
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
