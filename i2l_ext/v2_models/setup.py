"""DiffSynth-Studio in a folder of our own, set up when the user asks for it.

Exact versions, each file held against its hash, nothing built from source; torch, which has no hashes, from the index
with this machine's kind. The folder appears whole or not at all. What was fetched is kept until then, so that a set-up
that was broken off goes on. No other program's packages are touched.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.locks import Lock
from i2l_ext.process_tree import Tree, end_tree
from i2l_ext.v2_models import child
from i2l_ext.weights.compute import Callbacks

VERSION = "2.1.12"
"""DiffSynth-Studio's, as the lock has it."""

TORCH = ("torch==2.13.0", "torchvision==0.28.0")
"""From one index, so that they fit each other."""

INDEX = "https://download.pytorch.org/whl"
STAMP = "i2l-diffsynth.txt"
"""In the folder, once it is whole: what it was set up from."""

PACKAGES, TORCH_CPU, TORCH_CARD = (225 * 10**6, 650 * 10**6), (200 * 10**6, 720 * 10**6), (2750 * 10**6, 6500 * 10**6)
"""About how many bytes are to be downloaded, and lie on the disk. Measured on Linux, but for the last one's disk."""

VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT")
"""Of the environment, which would lead pip to other folders than ours."""

NO_NETWORK = re.compile(
    r"ConnectionError|NameResolution|establish a new connection|Connect(ion)?Timeout|timed out|ProxyError|unreachable"
)
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class SetupPlan:
    """What a set-up does: into ``folder``, with torch's build for ``kind``: cpu, such as cu130 or rocm6.4, or "" where
    there is only one; about so many bytes to download and on the disk."""

    folder: Path
    kind: str
    download_bytes: int
    disk_bytes: int

    @property
    def stamp(self) -> str:
        """Tells whether a folder was set up from the same."""
        digest = hashlib.sha256(lock_file().read_bytes())
        return f"{digest.hexdigest()} {' '.join(TORCH)} {self.kind}"

    @property
    def index(self) -> str | None:
        """Where torch comes from; None: from where all comes from."""
        return os.environ.get("I2L_TORCH_INDEX") or (f"{INDEX}/{self.kind}" if self.kind else None)

    @property
    def is_done(self) -> bool:
        """Whether the folder is there, whole, and of the same."""
        with suppress(OSError):
            return (self.folder / STAMP).read_text(encoding="utf-8") == self.stamp
        return False


def own_folder() -> Path:
    """Where we set it up: one for each user of this machine."""
    from platformdirs import user_data_dir

    return Path(user_data_dir("i2l", appauthor=False)) / "diffsynth"


def own_environment() -> Path | None:
    """The folder in which we have set it up; None where we have not, or not to the end."""
    folder = own_folder()
    return folder if (folder / STAMP).is_file() else None


def lock_file() -> Path:
    """The exact versions with their hashes: in the checkout, or beside this module in a wheel. Raises UserError."""
    here = Path(__file__).resolve()
    for path in (here.with_name("diffsynth.txt"), here.parents[2] / "requirements" / "diffsynth.txt"):
        if path.is_file():
            return path
    raise UserError("requirements/diffsynth.txt is missing from this installation. Install it again.")


def plan_setup(torch: str = "auto") -> SetupPlan:
    """What would be set up. ``torch``: cpu, or auto: the kind of the torch that runs here."""
    kind = "" if sys.platform == "darwin" else "cpu" if torch == "cpu" else _kind_here()
    sizes = zip(PACKAGES, TORCH_CPU if kind in ("", "cpu") else TORCH_CARD, strict=True)
    return SetupPlan(own_folder(), kind, *(packages + more for packages, more in sizes))


def _kind_here() -> str:
    import torch

    for name, version in (("cu", torch.version.cuda), ("rocm", torch.version.hip)):
        if version:
            major, minor = version.split(".")[:2]
            return f"cu{major}{minor}" if name == "cu" else f"rocm{major}.{minor}"
    return "cpu"


def set_up(plan: SetupPlan, callbacks: Callbacks) -> None:
    """Do it. Raises UserError where there is no network or no room, where another process is at it, and where what was
    installed does not run; Cancelled. What was fetched is kept then, and nothing else."""
    part = plan.folder.with_name(f"{plan.folder.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(part).free) < plan.download_bytes + plan.disk_bytes:
            need = (plan.download_bytes + plan.disk_bytes) / 1e9
            raise UserError(f"{part.parent}: {free / 1e9:.1f} GB are free, {need:.1f} GB are needed.", "disk_full")
        lock = Lock(part.with_suffix(".lock"))
        if not lock.acquire():
            raise UserError("DiffSynth-Studio is being set up already, by another process. Wait for it.", "busy")
        try:
            _fill(part, plan, callbacks)
            callbacks.begin_saving()
            _put(part, plan.folder)
        finally:
            lock.release()
    except OSError as error:
        raise UserError(f"{error.filename or part}: cannot be written ({error.strerror}).") from None


def _fill(part: Path, plan: SetupPlan, callbacks: Callbacks) -> None:
    fresh, cache = part / "new", part / "cache"
    shutil.rmtree(fresh, ignore_errors=True)  # of one that was broken off: installed again, from what was fetched
    venv.EnvBuilder(with_pip=False, symlinks=sys.platform != "win32").create(fresh)
    python = fresh / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-compile", "--progress-bar=off",
           "--disable-pip-version-check", "--retries=1", "--timeout=20", f"--cache-dir={cache}",
           "--only-binary=:all:"]  # fmt: skip
    lock = lock_file()
    count = len(re.findall(r"^[a-z0-9].*==", lock.read_text(encoding="utf-8"), re.MULTILINE))
    seen = 0

    def told(line: str) -> None:
        nonlocal seen
        seen += line.startswith(("Collecting ", "Processing ", "Ignoring "))
        callbacks.progress(0.95 * min(seen / (count + len(TORCH)), 1))

    _run([*pip, "--no-deps", "--require-hashes", "-r", str(lock)], told, callbacks)
    alone = ["--no-deps"] if plan.kind in ("", "cpu") else []  # torch for a card names what it needs of its maker
    index = ["--index-url", plan.index] if plan.index else []
    _run([*pip, *alone, *index, *TORCH], told, callbacks)
    _run([str(python), "-I", str(Path(child.__file__).resolve()), "check"], lambda line: None, callbacks)
    (fresh / STAMP).write_text(plan.stamp, encoding="utf-8")


def _put(part: Path, folder: Path) -> None:
    """The new one takes the place of the old one."""
    old = part / "old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    (part / "new").rename(folder)
    shutil.rmtree(part, ignore_errors=True)


def _run(command: Sequence[str], told: Callable[[str], None], callbacks: Callbacks) -> None:
    """Run it to its end; each line that it prints is told. Raises UserError where it fails, Cancelled."""
    environment = {name: held for name, held in os.environ.items() if name not in VARIABLES}
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []
    reader = Thread(target=_read, args=(process.stdout, lines), name="i2l-pip", daemon=True)
    reader.start()
    try:
        known = 0
        while process.poll() is None:
            callbacks.check()
            for line in lines[known:]:
                known += 1
                told(line)
            time.sleep(POLL_SECONDS)
    finally:
        end_tree(process, Tree(process.pid))  # pip works in a process of the other Python
        reader.join(5)
    if process.returncode == 0:
        return
    if any(NO_NETWORK.search(line) for line in lines):
        raise UserError(
            "DiffSynth-Studio was not set up: its packages cannot be fetched, as the network does not answer. What "
            "was fetched is kept: try again later.", "no_network",
        )  # fmt: skip
    last = next((line for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
    raise UserError(f"DiffSynth-Studio was not set up: {last.strip()[:300]}", "setup_failed")


def _read(stream: IO[str] | None, lines: list[str]) -> None:
    with suppress(OSError, ValueError):
        for line in stream or ():
            lines.append(line.rstrip("\n"))
