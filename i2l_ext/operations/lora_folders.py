"""One request on every LoRA of a folder and its sub-folders. A file that fails stops nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.scales import FOLDER_FILES
from i2l_ext.operations.context import Context
from i2l_ext.operations.lora_files import convert_lora, resize_lora
from i2l_ext.operations.lora_reports import check_lora
from i2l_ext.requests import CheckRequest, ConvertRequest, RankRequest, Request

EACH: Mapping[type[Request], Callable[[Any, Context], Any]] = {
    CheckRequest: check_lora, ConvertRequest: convert_lora, RankRequest: resize_lora,
}  # fmt: skip
"""What can be asked of a whole folder, and what does it for one file."""

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class FileOutcome:
    """What came of one file. ``name``: its path within the folder. Either ``result`` or ``error`` is None."""

    name: str
    result: Any = None
    error: UserError | None = None

    def json(self) -> dict[str, Any]:
        if self.error is not None:
            return {"file": self.name, "error": str(self.error), "code": self.error.code}
        told: dict[str, Any] = self.result.json()
        return told

    @property
    def reason(self) -> str:
        """Why it failed, beginning with its path within the folder."""
        return f"{self.name}: {str(self.error).removeprefix(f'{Path(self.name).name}: ')}"


def is_for_folder(request: Request) -> bool:
    """Whether a request is for all LoRAs of a folder. One with the LoRA of a PEFT adapter in it is a single LoRA."""
    file = getattr(request, "file", None)
    if type(request) not in EACH or file is None or not file.is_dir():
        return False
    return not any((file / name).is_file() for name in FOLDER_FILES)


def for_each_file(request: Any, context: Context) -> Iterator[FileOutcome]:
    """Do what a request asks for every LoRA in the folder ``file``, in the order of their names.

    What is written goes to the same place within the folder ``output``, which must be given. Raises UserError for
    what fails for all files, Cancelled when the reporter says so.
    """
    request.validate()
    folder, output = request.file, getattr(request, "output", None)
    if output is None and hasattr(request, "output"):
        raise UserError(f"{folder}: is a folder. Say with -o into which folder to write.")
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file. Name a folder to write into.")
    failures: list[OSError] = []
    files = list(_loras(folder, output, failures))
    if not files and not failures:
        raise UserError(f"{folder}: no {SUFFIX} file is in this folder.")
    for failure in failures:
        name = os.path.relpath(failure.filename, folder)
        yield FileOutcome(name, error=UserError(f"{name}: cannot be read ({failure.strerror})."))
    written: set[str] = set()
    for file in files:
        context.reporter.check()
        yield _outcome(request, file, output, written, context)


def _outcome(request: Any, file: Path, output: Path | None, written: set[str], context: Context) -> FileOutcome:
    name = file.relative_to(request.file)
    try:
        asked = replace(request, file=file)
        if output is None:
            return FileOutcome(str(name), EACH[type(request)](asked, context))
        target = output / (name.parent.with_name(name.parent.name + SUFFIX) if file.name in FOLDER_FILES else name)
        if str(target).lower() in written:
            raise UserError(f"{name}: {target} was just written from another file. Rename one of the two.")
        with _parent_folder(target):
            result = EACH[type(request)](replace(asked, output=target), context)
        written.add(str(target).lower())
    except UserError as error:
        return FileOutcome(str(name), error=error)
    return FileOutcome(str(name), result)


@contextmanager
def _parent_folder(target: Path) -> Iterator[None]:
    """A block in which the folder of a file exists. Where it was made for nothing, it is removed again."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be written ({error.strerror}).") from None
    finally:
        with suppress(OSError):  # it holds the file
            for parent in missing:
                parent.rmdir()


def _loras(folder: Path, output: Path | None, failures: list[OSError]) -> Iterator[Path]:
    """The LoRA files under ``folder``, without hidden ones, links to folders, and what was written to ``output``."""
    skipped = output.resolve() if output is not None and output.resolve() != folder.resolve() else None
    for parent, folders, names in os.walk(folder, onerror=failures.append):
        place = Path(parent)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (place / name).resolve() != skipped
        )
        adapters = [name for name in FOLDER_FILES if name in names] if place != folder else []
        for name in adapters[:1] or sorted(names):
            if name.lower().endswith(SUFFIX) and not name.startswith("."):
                yield place / name
