"""Downloads model files from a hub into our own folder, as ``<folder>/<repo>/<file>``.

A file grows under a hidden name with its checksum, so that the next run resumes where a broken connection, a stop or a
full disk ended this one. It gets its own name once it is whole and the checksum is right.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast

from i2l_ext.converters.atomic import place
from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.models.catalogue import Checkpoint, I2LModel
from i2l_ext.models.checked_files import DownloadCallbacks, digest, write_note
from i2l_ext.models.hubs import BROKEN, BROKEN_PACKED, Hub, RemoteFile, explain
from i2l_ext.models.pack import PACKED_KINDS, check_room, write_packed
from i2l_ext.models.store import INDEX, Folders, gigabytes, locate, packing_note, shards
from i2l_ext.weights.packing import PackNote, packed_bytes, packed_name

if TYPE_CHECKING:
    from i2l_ext.weights.pack_writer import PackWriter

Result = TypeVar("Result")

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


class DeliveryError(UserError):
    """The hub did not deliver a file. ``lasting``: trying again at once does not help."""

    def __init__(self, hub: Hub, repo: str, file: str, reason: str, lasting: bool = False) -> None:
        super().__init__(f"{hub.name} did not deliver {file} of {repo}: {reason}.", "not_delivered")
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


def _has_sha256(remote: RemoteFile) -> bool:
    """Whether it is a large file, a shard and no index of shards."""
    return len(remote.digest) == 64 and remote.file.endswith(".safetensors")


def notes(parts: Sequence[Checkpoint]) -> list[str]:
    """What to agree to before a download: a line for each part, with its size, its origin and its licence."""
    return [f"{part.id}: {gigabytes(part.nbytes)} from {part.repo}. Licence: {part.licence}" for part in parts]


def download(
    parts: Sequence[Checkpoint], hub: Hub, folder: Path, callbacks: DownloadCallbacks | None = None, form: str = ""
) -> list[Path]:
    """Fetch the files of ``parts`` into ``folder``; their paths. ``form``: pack them while they arrive (as a key
    of PACK_FORMATS says), so that the disk never holds the unpacked file. A file that is not whole is then fetched anew
    by the next run.

    Raises UserError for what the user can put right (no connection, no permission, a full disk, wrong bytes), Cancelled
    within a second. What was fetched until then is used by the next run.
    """
    fetching = _Download(hub, folder, callbacks or DownloadCallbacks())
    wanted = [
        (remote, part, form if part.kind in PACKED_KINDS and _has_sha256(remote) else "")
        for part in parts for remote in fetching.files(part)
    ]  # fmt: skip
    fetching.check_space(wanted)
    return [fetching.obtain_packed(remote, part, to) if to else fetching.obtain(remote) for remote, part, to in wanted]


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

    def packed(self, remote: RemoteFile, form: str) -> Path:
        final = self.final(remote)
        return final.with_name(packed_name(final.name, form))

    def part(self, remote: RemoteFile) -> Path:
        final = self.final(remote)
        return final.with_name(f".{final.name}.{remote.digest[:16]}.part")

    def check_space(self, wanted: Sequence[tuple[RemoteFile, Checkpoint, str]]) -> None:
        """Raises UserError where the disk has not enough space for what is missing, in its form."""
        due = 0
        for remote, part, form in wanted:
            if form:
                due += 0 if self.packed(remote, form).exists() else packed_bytes(remote.size, part.dtype, form)
            elif not self.final(remote).exists():
                due += max(remote.size - _size(self.part(remote)), 0)
        check_room(self.folder, due, "downloaded")

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
        self.complete(
            remote, lambda: _size(part) if part.exists() else -1, lambda stop: self.transfer(remote, part, stop)
        )
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

    def obtain_packed(self, remote: RemoteFile, part: Checkpoint, form: str) -> Path:
        """The packed form of the file, which is packed while it arrives unless it is there."""
        final = self.packed(remote, form)
        if final.exists():
            note = packing_note(final)
            if note is None or (note.checkpoint, note.origin) != (part.id, remote.digest):
                raise UserError(f"{final}: was not packed from what {self.hub.name} has. Move it away or delete it.")
            return final

        def fill(writer: PackWriter) -> None:
            try:
                self.complete(
                    remote, lambda: writer.taken, lambda stop: self.transfer_packed(remote, final, writer, stop)
                )
            except DeliveryError as broken:
                raise UserError(str(broken).replace(BROKEN, BROKEN_PACKED)) from broken

        note = PackNote(part.id, Path(remote.file).name, form, remote.digest)
        facts = {"source": self.hub.name, "repo": remote.repo, "file": remote.file, "revision": remote.revision}
        return write_packed(final, remote.size, note, fill, self.callbacks, facts)

    def complete(self, remote: RemoteFile, received: Callable[[], int], transfer: Callable[[Event], None]) -> None:
        """Fetch the rest of a file, over as many connections as that takes. ``received``: bytes that are here, -1
        where there is no file yet; ``transfer`` fetches more over one connection."""
        empty = 0
        while received() != remote.size:
            self.callbacks.check()
            before = received()
            try:
                with self.explained(remote.repo, remote.file):
                    _interruptible(transfer, self.callbacks, self.report(remote, received))
            except DeliveryError as broken:
                empty = 0 if received() > before else empty + 1
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

    def transfer_packed(self, remote: RemoteFile, final: Path, writer: PackWriter, stop: Event) -> None:
        """The same, into a packed file."""
        from filelock import FileLock, Timeout

        sink = _PackingSink(writer, final.parent, stop)
        try:
            with FileLock(f"{self.part(remote)}.lock", blocking=False):
                self.hub.fetch(remote, cast("BinaryIO", sink), sink.tell())
        except Timeout:
            raise UserError(f"{remote.file}: is being downloaded by another run. Wait for it, or stop it.") from None
        if sink.tell() < remote.size:
            raise DeliveryError(self.hub, remote.repo, remote.file, BROKEN)

    def report(self, remote: RemoteFile, received: Callable[[], int]) -> Callable[[], None]:
        return lambda: self.callbacks.progress(f"download {remote.file}", max(received(), 0), remote.size)

    def note(self, remote: RemoteFile, measured: Path) -> None:
        """Write down beside the file what the hub says of it. ``measured``: the file, perhaps under its hidden name."""
        if len(remote.digest) != 64:
            return
        facts = {"source": self.hub.name, "repo": remote.repo, "file": remote.file, "revision": remote.revision}
        write_note(self.final(remote), measured, remote.digest, facts)

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


class _PackingSink:
    """Gives what comes to a packer, as ``_Sink`` gives it to a file. Once ``stop`` is set it raises Cancelled."""

    def __init__(self, writer: PackWriter, folder: Path, stop: Event) -> None:
        self.writer, self.folder, self.stop = writer, folder, stop

    def write(self, chunk: bytes) -> int:
        if self.stop.is_set():
            raise Cancelled
        if self.writer.taken + len(chunk) > self.writer.size:
            self.truncate()
            raise ConnectionError("more came than was announced")
        with _writing(self.folder):
            return self.writer.write(chunk)

    def tell(self) -> int:
        return self.writer.taken

    def seek(self, position: int) -> int:
        """Only to the start, before all of it is thrown away."""
        return position

    def truncate(self) -> int:
        with _writing(self.folder):
            self.writer.restart()
        return 0


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
