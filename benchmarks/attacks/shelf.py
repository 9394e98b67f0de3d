"""A folder that a user treasures, and what may have become of it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image

from i2l_ext.converters import atomic
from i2l_ext.converters.architectures import ARCHITECTURES
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TensorFile
from i2l_ext.converters.lora import Lora

OURS = (".json", ".preview.png", ".safetensors")


def lora(path: Path, arch: str = "mini", seed: int = 0, modules: int = 4) -> Path:
    """A small sound LoRA."""
    torch.manual_seed(seed)
    found = ARCHITECTURES[arch]
    pairs = {}
    for name in sorted(found.i2l_modules, key=lambda name: sum(found.i2l_modules[name].shape))[:modules]:
        d_out, d_in = found.modules[name].shape
        pairs[name] = torch.randn(4, d_in), torch.randn(d_out, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    Lora.of(found, pairs).save(path, overwrite=True)
    return path


def lay(folder: Path) -> Path:
    """What lies there before: LoRAs with their cards, other people's files, a folder below. The LoRA folder."""
    shelf = folder / "Lora"
    for name in ("old", "styles/other", "style"):
        file = lora(shelf / f"{name}.safetensors", seed=len(name))
        file.with_suffix(".json").write_text('{"notes": "mine"}\n')
        Image.new("RGB", (8, 8)).save(file.with_suffix(".preview.png"))
    (shelf / "notes.txt").write_text("not a LoRA")
    (shelf / "half.safetensors").write_bytes(b"somebody else's, and broken")
    return shelf


def passing(path: Path) -> bool:
    """Whether it is a file on its way, which no host lists."""
    return any(part.startswith(".") and ".part" in part for part in path.parts)


def state(folder: Path) -> dict[str, str]:
    """{path: sha256} of all that can be seen there."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if path.is_file() and not passing(below):
            seen[str(below)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return seen


def left(folder: Path) -> list[str]:
    """What is on its way."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if passing(path.relative_to(folder)))


def complete(path: Path) -> str | None:
    """Why a file is not complete and valid, or None."""
    try:
        if path.suffix == ".safetensors":
            with TensorFile(path) as file:
                for name, entry in file.header.tensors.items():
                    if entry.dtype in ("F32", "F16", "BF16") and not torch.isfinite(file.tensor(name).float()).all():
                        return f"{path.name}: not finite"
        elif path.suffix in (".json", ".sha256"):
            json.loads(path.read_bytes())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()[:-1]]  # a log grows: its last line may be cut
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif not path.read_bytes().endswith(b"\n"):
            return f"{path.name}: does not end with a line"
    except (UserError, OSError, ValueError, SyntaxError) as error:
        return f"{path.name}: {error}"
    return None


def harm(before: Mapping[str, str], folder: Path, may_change: Callable[[str], bool]) -> list[str]:
    """What is wrong with the folder: an old file that is neither the old one nor a complete new one where that was
    asked for, a new one that is not complete."""
    after, found = state(folder), []
    for name, digest in before.items():
        if name not in after:
            found += [] if ".steps/" in name else [f"{name} is gone"]  # a training drops its older checkpoints
        elif after[name] != digest and not may_change(name):
            found.append(f"{name} was changed")
    changed = [name for name, digest in after.items() if before.get(name) != digest]
    return found + [reason for name in changed if (reason := complete(folder / name))]


def forked(work: Callable[[], int], said: Path) -> int:
    """Do ``work`` in a fork that keeps its words in a file; the fork's id."""
    said.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
        torch.set_num_threads(1)  # the threads of a team that the parent has used are not in the fork: it would wait
        code = work()
    except UserError as error:
        print(f"UserError: {error}", file=sys.stderr)
        code = 1
    except BaseException:  # noqa: BLE001 - a fork must not return into its parent's code
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """A fork's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_once() -> None:
    """Let what dead processes left be removed without the minute's wait; living ones still hold theirs."""
    atomic.STALE_AFTER = -1.0
