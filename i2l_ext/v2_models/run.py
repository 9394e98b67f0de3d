"""Pictures -> the LoRA that a template makes of them, in a process that is shut in and not believed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING

from i2l_ext.converters.architectures import Architecture
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TensorFile, all_finite
from i2l_ext.converters.keys import parse_keys
from i2l_ext.converters.lora import from_file
from i2l_ext.process_tree import Tree, end_tree
from i2l_ext.v2_models import child
from i2l_ext.v2_models.cage import Cage, CagedProcess, strongest_cage
from i2l_ext.v2_models.consent import has_consent
from i2l_ext.v2_models.python import DiffSynthPython
from i2l_ext.v2_models.repository import TemplateRepository
from i2l_ext.weights.compute import Callbacks

if TYPE_CHECKING:
    from PIL import Image

    from i2l_ext.converters.lora import Lora

PRINTED_LIMIT = 64 << 10
"""Bytes of what the process prints that are kept: the last."""

POLL_SECONDS = 0.1
RESULT = "lora.safetensors"
RESULT_LIMIT = 4 << 30


def _memory_of_this_machine() -> int:
    """Bytes; where the system does not tell (Windows), as many as many machines have."""
    if sys.platform != "win32":
        with suppress(ValueError, OSError):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 16 << 30


@dataclass(frozen=True)
class Bounds:
    """What a template may take: ``seconds`` of time, bytes of ``memory`` over all its processes (as many as the machine
    has), and ``processes``."""

    seconds: float = 1800
    memory: int = field(default_factory=_memory_of_this_machine)
    processes: int = 32


def template_lora(
    repository: TemplateRepository,
    arch: Architecture,
    pictures: Sequence[Image.Image],
    python: DiffSynthPython,
    folder: Path,
    callbacks: Callbacks,
    *,
    device: str = "cpu",
    bounds: Bounds | None = None,
    cage: Cage | None = None,
) -> Lora:
    """The LoRA that the template makes of all pictures together. Its file is written into ``folder``, which must be
    kept as long as the value is used.

    Nothing of the template is imported unless the user has agreed to its digest. Raises UserError for that, for a
    template that fails or takes too much, and for a result that is no LoRA of ``arch`` with finite numbers; Cancelled.
    """
    if not has_consent(repository):
        raise UserError(
            f"{repository.model} brings code of its own, and you have not agreed to run it. See it and decide: "
            f"i2l models trust {repository.model}",
            "untrusted",
        )
    bounds, cage = bounds or Bounds(), cage or strongest_cage()
    with tempfile.TemporaryDirectory(prefix="i2l-template-") as made:
        scratch = Path(made).resolve()
        for number, picture in enumerate(pictures):
            picture.save(scratch / f"{number}.png")
        script = Path(child.__file__).resolve()
        arguments = [str(repository.folder.resolve()), str(scratch), device, str(bounds.memory)]
        # -B: with -I Python does not heed PYTHONDONTWRITEBYTECODE, and a file more would be another digest
        command = [str(python.executable), "-I", "-B", str(script), *arguments]
        reads = (*python.reads, repository.folder.resolve(), script)
        run_caged(CagedProcess(command, reads, scratch, device), cage, bounds, callbacks, repository.repo)
        result = folder / RESULT
        take_result(scratch / RESULT, result)
    return checked_lora(result, arch, repository.repo)


def run_caged(run: CagedProcess, cage: Cage, bounds: Bounds, callbacks: Callbacks, whose: str) -> None:
    """Run it to the end; ``whose`` code it is, for messages.

    Raises UserError where it fails or takes too much, Cancelled; then all its processes are gone.
    """
    try:
        process = subprocess.Popen(
            cage.command(run), env=run.environment, cwd=run.scratch, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{run.command[0]}: cannot be started ({error.strerror}).") from None
    printed = bytearray()
    reader = Thread(target=_read, args=(process.stdout, printed), name="i2l-template", daemon=True)
    reader.start()
    tree, start, trouble = Tree(process.pid), time.monotonic(), ""
    try:
        while process.poll() is None and not trouble:
            callbacks.check()
            time.sleep(POLL_SECONDS)
            used = tree.measure()
            if time.monotonic() - start > bounds.seconds:
                trouble = f"did not end within {bounds.seconds:g} seconds"
            elif used.memory > bounds.memory:
                trouble = f"took more than {bounds.memory / 1e9:.1f} GB of memory"
            elif used.processes > bounds.processes:
                trouble = f"started more than {bounds.processes} processes"
    finally:
        end_tree(process, tree)
        reader.join(1)
    if trouble:
        raise UserError(f"{whose}: its code {trouble}, and was stopped.", "template_stopped")
    if process.returncode:
        last = _last_line(printed) or f"exit code {process.returncode}"
        raise UserError(f"{whose}: its code failed: {last}", "template_failed")


def _read(stream: IO[bytes] | None, printed: bytearray) -> None:
    with suppress(OSError, ValueError):
        while stream and (piece := stream.read1(4096)):  # type: ignore[attr-defined]
            printed += piece
            del printed[:-PRINTED_LIMIT]


def _last_line(printed: bytes | bytearray) -> str:
    """The last line that was printed, fit for one line of ours."""
    lines = [line.strip() for line in printed.decode("utf-8", "replace").splitlines() if line.strip()]
    return "".join(c if c.isprintable() else "?" for c in lines[-1])[:300] if lines else ""


def take_result(source: Path, target: Path) -> None:
    """Move the result out of the scratch folder. A link is not followed. Raises UserError where there is none."""
    if source.is_symlink() or not source.is_file():
        raise UserError("The template ended without a LoRA.", "template_failed")
    if source.stat().st_size > RESULT_LIMIT:
        raise UserError("The template's LoRA is larger than any LoRA is.", "template_failed")
    try:
        shutil.copyfile(source, target, follow_symlinks=False)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}).") from None


def checked_lora(path: Path, arch: Architecture, whose: str) -> Lora:
    """The LoRA in the file, once its names, shapes and numbers are what the architecture has. Raises UserError."""
    try:
        file = TensorFile(path)
        reading = parse_keys(file.header.shapes, whose)
        if reading.arch is not arch:
            raise UserError(f"{whose}: it made a LoRA of {reading.arch.title}, not of {arch.title}.")
        odd = [*reading.foreign, *reading.text_encoder, *reading.stray_alphas, *reading.doubled, *reading.biases]
        if odd or reading.networks:
            raise UserError(f"{whose}: it made a tensor that no module of {arch.title} has: {odd[:1]}.")
        for name, info in file.header.tensors.items():
            if info.dtype not in ("F32", "BF16", "F16"):
                raise UserError(f"{whose}: it made {name!r} of {info.dtype}, not of floats.")
            if not all(all_finite(piece, info.dtype) for piece in file.chunks(name)):
                raise UserError(f"{whose}: it made {name!r} with numbers that are not finite.")
        return from_file(file)
    except UserError as error:
        raise UserError(str(error), "template_failed") from None
