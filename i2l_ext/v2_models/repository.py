"""A downloaded template: its files, and the hash that a user agrees to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from i2l_ext.converters.errors import UserError
from i2l_ext.models.store import read_note

CODE = "model.py"
"""The file that DiffSynth-Studio imports; it may import every other."""

COMPILED = (".pyc", ".pyo")
"""Python's compiled code: where it lies beside a module, it is run and the module is not read."""

MOST_FILES = 500
CHUNK = 8 << 20
MOST_TEXT = 256 << 10
"""Bytes of the code that are shown."""


@dataclass(frozen=True)
class TemplateRepository:
    """A folder with ``model.py`` and weights. ``repo``: its name on the hub; ``model``: ours. ``check`` is called
    between two reads and may raise Cancelled."""

    folder: Path
    repo: str
    model: str
    check: Callable[[], None] = lambda: None

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The sha256 of every file by its name in the folder, sorted, without exception and always computed: whatever
        lies there, the code can read and run.

        Raises UserError for links, special files and compiled code, and for more files than a template has.
        """
        found: dict[str, str] = {}
        try:
            for path in sorted(self.folder.rglob("*")):
                name = path.relative_to(self.folder).as_posix()
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise UserError(f"{self.folder.name}: {name} is a link or no plain file, and a template has none.")
                if path.is_dir():
                    continue
                if path.suffix in COMPILED:
                    raise UserError(
                        f"{path}: is compiled code, which Python would run in place of the {CODE} that is shown. "
                        "Delete it."
                    )
                if len(found) == MOST_FILES:
                    raise UserError(f"{self.folder.name}: more than {MOST_FILES} files: not a template.")
                found[name] = self._sha256(path)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read ({error.strerror}).") from None
        if CODE not in found:
            raise UserError(f"{self.folder}: holds no {CODE}, so it is not a template.")
        return found

    @cached_property
    def digest(self) -> str:
        """64 hex digits that change with any file of the folder: sha256 over the lines ``SHA256  NAME``, as
        ``sha256sum`` prints them, in the order of the names."""
        lines = "".join(f"{sha}  {name}\n" for name, sha in self.hashes.items())
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def text(self) -> str:
        """What ``model.py`` says, for a person: characters that do not show, or show elsewhere than they stand, are
        escaped; of a file that is longer than any model's code, the beginning. Raises UserError."""
        try:
            with (self.folder / CODE).open("rb") as stream:
                said = stream.read(MOST_TEXT + 1)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read ({error.strerror}).") from None
        text = said[:MOST_TEXT].decode("utf-8", "backslashreplace").replace("\r\n", "\n")
        shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
        return shown + "\n[...]" * (len(said) > MOST_TEXT)

    @property
    def revision(self) -> str:
        """The hub's name for the state that was downloaded; "unknown" where it was not downloaded by us."""
        return str(read_note(self.folder / CODE).get("revision") or "unknown")

    @property
    def source(self) -> str:
        """A link to read the code."""
        note = read_note(self.folder / CODE)
        if note.get("source") == "huggingface":
            return f"https://huggingface.co/{self.repo}/blob/{self.revision}/{CODE}"
        return f"https://modelscope.cn/models/{self.repo}/file/view/master/{CODE}"

    def _sha256(self, path: Path) -> str:
        sha = hashlib.sha256()
        with path.open("rb") as stream:
            while piece := stream.read(CHUNK):
                self.check()
                sha.update(piece)
        return sha.hexdigest()
