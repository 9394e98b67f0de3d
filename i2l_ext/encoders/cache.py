"""Encoder results on disk: encoding takes most of the time of a make, and its results are small.

Each entry is a safetensors file, named by its key. Reading one sets its time of change, so that the least recently
used entries are deleted first when the folder is too large. There is no index, so several processes may read, write
and clear at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
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
"""Bytes. Room for some 200 pictures of Coarse and Fine (10 MB each in bfloat16), for 600 as SigLIP2's patch tokens
(3.5 MB each), or all of Style one will ever need."""

STALE = 3600.0
"""Seconds after which a half-written file counts as left by a process that died."""

TRIM_SHARE = 16
"""The folder is listed again after a sixteenth of the limit was written: listing 20,000 entries takes 0.2 s."""


@dataclass
class _WriteBudget:
    """Bytes that may be written before the folder is listed again."""

    left: int = 0


@dataclass(frozen=True)
class EmbeddingCache:
    """Tensors by key in ``folder``: at most ``limit`` bytes, and a sixteenth more for each process that writes. A key
    is a hex digest, such as ``embedding_key`` gives."""

    folder: Path
    limit: int = LIMIT
    _budget: _WriteBudget = field(default_factory=_WriteBudget, init=False, repr=False, compare=False)

    @staticmethod
    def default() -> EmbeddingCache:
        """Where the system keeps caches, unless ``I2L_CACHE`` names a folder."""
        from platformdirs import user_cache_dir

        root = os.environ.get("I2L_CACHE") or user_cache_dir("i2l", appauthor=False)
        return EmbeddingCache(Path(root).expanduser() / "embeddings")

    def get(self, key: str) -> torch.Tensor | None:
        """The tensor that was put, or None. A damaged entry is deleted and gives None."""
        path = self._path(key)
        try:
            with files.TensorFile(path) as file:
                tensor = file.tensor("embedding")
                sound = file.header.metadata.get("sha256") == sha256(files.tensor_bytes(tensor)).hexdigest()
        except UserError:
            sound = False
        with suppress(OSError):  # deleted meanwhile, or a folder that can only be read
            if sound:
                os.utime(path)
            else:
                path.unlink(missing_ok=True)
        return tensor if sound else None

    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Keep ``tensor``. Old entries are deleted at the first call, and whenever a share of the limit was written.
        Where the disk is full or cannot be written to, nothing is kept and nothing is raised."""
        tensor = tensor.detach().cpu().contiguous()
        digest = sha256(files.tensor_bytes(tensor)).hexdigest()
        path = self._path(key)
        with suppress(OSError, UserError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic.locked_temp_file(self.folder) as part:
                with part.open("wb") as stream:
                    files.write(stream, [files.WritePlan.of("embedding", tensor)], {"sha256": digest})
                self._budget.left -= part.stat().st_size
                atomic.place(part, path, overwrite=True)
            if self._budget.left < 0:
                self._trim()

    def get_or_encode(
        self, keys: Sequence[str], encode: Callable[[Sequence[int], int], Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """The tensors of all keys. ``encode`` gets the indices of those that are missing, if any, and the bytes of
        those that were found; what it gives is kept."""
        tensors = [self.get(key) for key in keys]
        missing = [index for index, tensor in enumerate(tensors) if tensor is None]
        if missing:
            found = sum(tensor.nbytes for tensor in tensors if tensor is not None)
            for index, tensor in zip(missing, encode(missing, found), strict=True):
                tensors[index] = tensor
                self.put(keys[index], tensor)
        return [tensor for tensor in tensors if tensor is not None]

    def clear(self) -> tuple[int, int]:
        """Delete every entry; how many there were, and their bytes."""
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
        """When each was last used, its bytes, its path; also half-written files of processes that died."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            with suppress(OSError):
                status = path.stat()
                if path.suffix == ".safetensors":
                    yield status.st_mtime, status.st_size, path
                elif path.suffix == ".part" and time() - status.st_mtime > STALE:
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
        self._budget.left = self.limit // TRIM_SHARE

    def _drop(self, entries: list[tuple[float, int, Path]]) -> tuple[int, int]:
        dropped = [size for _, size, path in entries if _unlink(path)]
        return len(dropped), sum(dropped)


def embedding_key(pixels: bytes, encoder: str, identity: str, dtype: str) -> str:
    """The key of an embedding: equal pixels, encoder, weights and arithmetic give an equal embedding.

    ``encoder`` is the ``output`` of its checkpoint, ``identity`` a text that changes when its files do, ``dtype`` that
    in which it is computed.
    """
    facts = (sha256(pixels).hexdigest(), encoder, identity, dtype)
    return sha256("\n".join(facts).encode()).hexdigest()


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:  # another process was faster, or has it open on Windows
        return False
    return True
