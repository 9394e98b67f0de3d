"""What shuts a template's process in: bubblewrap, else a network namespace, else nothing but bounds.

The table in docs/trust.md says what each of them stops.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
"""What programs and their libraries need; seen in the cage, never written to."""

DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/dri", "/dev/kfd")
"""Graphics cards, for a run on one."""

PASSED = ("PATH", "LANG", "SYSTEMROOT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
"""The variables of the environment that the process sees, beside those that we set."""


@dataclass(frozen=True)
class CagedProcess:
    """A process to shut in. ``command``: what it runs; ``reads``: what it may read beside the system's own folders;
    ``scratch``: the only folder that it may write to; ``device``: cpu, or a graphics card's."""

    command: Sequence[str]
    reads: Sequence[Path]
    scratch: Path
    device: str = "cpu"

    @property
    def environment(self) -> dict[str, str]:
        """What the process sees of the environment: nothing private. Home and temporary folder are the scratch."""
        passed = {name: os.environ[name] for name in PASSED if name in os.environ}
        home = str(self.scratch)
        places = {"HOME": home, "USERPROFILE": home, "TMPDIR": home, "TEMP": home, "TMP": home, "XDG_CACHE_HOME": home}
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        return {**passed, **places, **offline}


@dataclass(frozen=True)
class Cage:
    """``stops``: what is stopped, in words for the user; ``lets``: what is not."""

    name: str
    stops: tuple[str, ...]
    lets: tuple[str, ...]

    @property
    def line(self) -> str:
        lets = f"; it does not stop: {', '.join(self.lets)}" if self.lets else ""
        return f"{self.name}: stops {', '.join(self.stops)}{lets}"

    def command(self, run: CagedProcess) -> list[str]:
        """The command line that starts the process shut in."""
        return [*_WRAPPERS[self.name](run), *run.command]


_BOUNDS = ("more memory, time or processes than allowed",)
BUBBLEWRAP = Cage("bubblewrap", ("the network", "reading or writing your files", *_BOUNDS), ())
NAMESPACE = Cage("network namespace", ("the network", *_BOUNDS), ("reading and writing your files",))
BOUNDS = Cage("bounds only", _BOUNDS, ("the network", "reading and writing your files"))


@cache
def strongest_cage() -> Cage:
    """The strongest that works on this system: each is tried once."""
    if sys.platform == "linux":
        scratch = Path(tempfile.gettempdir())
        for cage in (BUBBLEWRAP, NAMESPACE):
            if _works(cage.command(CagedProcess(["/bin/sh", "-c", "exit 7"], (), scratch))):
                return cage
    return BOUNDS


def _works(command: Sequence[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 7
    except (OSError, subprocess.SubprocessError):
        return False


def _bubblewrap(run: CagedProcess) -> list[str]:
    return ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", *_mounts(run), "--"]


def _mounts(run: CagedProcess) -> Iterator[str]:
    for folder in SYSTEM_FOLDERS:
        if Path(folder).is_symlink():
            yield from ("--symlink", str(Path(folder).readlink()), folder)
        else:
            yield from ("--ro-bind-try", folder, folder)
    yield from ("--proc", "/proc", "--dev", "/dev", "--tmpfs", tempfile.gettempdir())
    if run.device != "cpu":
        yield from ("--ro-bind-try", "/sys", "/sys")
        for device in DEVICES:
            yield from ("--dev-bind-try", device, device)
    for path in run.reads:
        yield from ("--ro-bind", str(path), str(path))
    yield from ("--bind", str(run.scratch), str(run.scratch), "--chdir", str(run.scratch))


def _namespace(run: CagedProcess) -> list[str]:
    return ["unshare", "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child", "--"]


_WRAPPERS: Mapping[str, Callable[[CagedProcess], list[str]]] = {
    "bubblewrap": _bubblewrap,
    "network namespace": _namespace,
    "bounds only": lambda run: [],
}
