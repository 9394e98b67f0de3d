"""What a picture gave an encoder, kept on disk: encoding is the long part of the work, and its answer is small.

One safetensors file an entry, whose name is the key. A look-up touches the file's time of change, so that the
entries looked at least recently go first when the folder has grown too large. There is no index to get out of step:
several processes may read, write and clear at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from time import time
from typing import TYPE_CHECKING

from i2l_ext.converters import atomic, files
from i2l_ext.converters.errors import UserError

if TYPE_CHECKING:
    import torch

LIMIT = 2 << 30
"""Bytes. Room for some 200 pictures of Coarse and Fine (10 MB each in bfloat16), or all of Style one will ever need."""

FORGOTTEN = 3600.0
"""Seconds after which a half-written file is taken for the rest of a process that died."""


SHARE = 16
"""What part of the limit is written before the folder is looked through again: that takes 0.2 s with 20,000 entries."""


@dataclass
class _Room:
    """Bytes that may be written before the folder is looked through."""

    left: int = 0


@dataclass(frozen=True)
class Cache:
    """Tensors by key in ``folder``, at most ``limit`` bytes of them, and a sixteenth more for each process that is
    writing. A key is a hex digest of all that the tensor depends on: pixels, weights, encoder, arithmetic."""

    folder: Path
    limit: int = LIMIT
    _room: _Room = field(default_factory=_Room, init=False, repr=False, compare=False)

    @staticmethod
    def default() -> Cache:
        """Where the system keeps caches, unless ``I2L_CACHE`` names a folder."""
        from platformdirs import user_cache_dir

        root = os.environ.get("I2L_CACHE") or user_cache_dir("i2l", appauthor=False)
        return Cache(Path(root).expanduser() / "embeddings")

    def get(self, key: str) -> torch.Tensor | None:
        """The tensor as it was put, or None. An entry that is damaged goes, and None is what it gives."""
        path = self._path(key)
        try:
            with files.TensorFile(path) as file:
                tensor = file.tensor("embedding")
                sound = file.header.metadata.get("sha256") == sha256(files.tensor_bytes(tensor)).hexdigest()
        except UserError:
            sound = False
        with suppress(OSError):  # gone meanwhile, or a folder that only lets us read
            if sound:
                os.utime(path)
            else:
                path.unlink(missing_ok=True)
        return tensor if sound else None

    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Keep ``tensor``, and let old entries go: at the first one, and whenever a share of the limit was written. A
        disk that is full or not ours is no reason to fail: nothing is kept then."""
        tensor = tensor.detach().cpu().contiguous()
        digest = sha256(files.tensor_bytes(tensor)).hexdigest()
        path = self._path(key)
        with suppress(OSError, UserError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic.locked_temp_file(self.folder) as part:
                with part.open("wb") as stream:
                    files.write(stream, [files.WritePlan.of("embedding", tensor)], {"sha256": digest})
                self._room.left -= part.stat().st_size
                atomic.place(part, path, overwrite=True)
            if self._room.left < 0:
                self._trim()

    def clear(self) -> tuple[int, int]:
        """Let every entry go; how many went, and their bytes."""
        return self._drop(list(self._entries()))

    def size(self) -> tuple[int, int]:
        """How many entries there are, and their bytes."""
        sizes = [size for _, size, _ in self._entries()]
        return len(sizes), sum(sizes)

    def _path(self, key: str) -> Path:
        if not key or set(key) - set("0123456789abcdef"):
            raise ValueError(f"{key!r} is no hex digest")
        return self.folder / f"{key}.safetensors"

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """When each was last used, its bytes, its path; also what a process that died left half-written."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            with suppress(OSError):
                status = path.stat()
                if path.suffix == ".safetensors":
                    yield status.st_mtime, status.st_size, path
                elif path.suffix == ".part" and time() - status.st_mtime > FORGOTTEN:
                    yield 0.0, status.st_size, path

    def _trim(self) -> None:
        atomic.remove_stale(self.folder)
        entries = sorted(self._entries())
        surplus = sum(size for _, size, _ in entries) - self.limit
        going = []
        for entry in entries:
            if surplus <= 0:
                break
            surplus -= entry[1]
            going.append(entry)
        self._drop(going)
        self._room.left = self.limit // SHARE

    def _drop(self, entries: list[tuple[float, int, Path]]) -> tuple[int, int]:
        dropped = [size for _, size, path in entries if _unlink(path)]
        return len(dropped), sum(dropped)


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:  # another process was faster, or has it open on Windows
        return False
    return True
