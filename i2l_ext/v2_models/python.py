"""The Python of an installed DiffSynth-Studio: found, and asked where its packages lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from i2l_ext.converters.errors import UserError
from i2l_ext.v2_models.setup import own_environment

VARIABLE = "I2L_DIFFSYNTH"
"""Names that Python, or the folder of its environment, where no option does."""

PROBE = """
import importlib.metadata, json, sys
sys.path = [path for path in sys.path if path]
print(json.dumps({"version": importlib.metadata.version("diffsynth"), "path": sys.path,
                  "prefixes": [sys.prefix, sys.base_prefix, sys.exec_prefix], "executable": sys.executable}))
"""
PROBE_SECONDS = 60


@dataclass(frozen=True)
class DiffSynthPython:
    """``executable``: its command; ``version``: DiffSynth-Studio's; ``reads``: the folders that it needs to run."""

    executable: Path
    version: str
    reads: tuple[Path, ...]


def find_python(named: str | None) -> DiffSynthPython:
    """The Python that ``named``, or else the environment, says: the executable, or the folder of its environment;
    without either the one that we have set up.

    Raises UserError where none is named, where it does not run, and where DiffSynth-Studio is not installed in it.
    """
    place = named or os.environ.get(VARIABLE) or own_environment()
    if not place:
        raise UserError(
            "This model runs through DiffSynth-Studio. Have it set up in a folder of its own: i2l models diffsynth. Or "
            "name the folder of the environment in which you have it: --diffsynth DIR.", "no_diffsynth",
        )  # fmt: skip
    executable = _executable(Path(place).expanduser().absolute())
    try:
        asked = subprocess.run(
            [executable, "-I", "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
        told = json.loads(asked.stdout.strip().rpartition("\n")[2]) if asked.returncode == 0 else None
    except (OSError, ValueError, subprocess.SubprocessError):
        told = None
        asked = None
    if told is None:
        lacking = asked is not None and "PackageNotFoundError" in asked.stderr
        raise UserError(
            f"{executable}: DiffSynth-Studio is not installed there. Install it: {executable} -m pip install diffsynth."
            if lacking
            else f"{executable}: does not run as a Python. Name the environment in which DiffSynth-Studio is installed."
        )
    places = [executable, *map(Path, (*told["path"], *told["prefixes"], told["executable"]))]
    places += [path.resolve() for path in places]
    reads = tuple(path for path in dict.fromkeys(places) if path.exists() and path != Path(path.anchor))
    return DiffSynthPython(executable, told["version"], reads)


def _executable(place: Path) -> Path:
    if not place.is_dir():
        return place
    name = Path("Scripts/python.exe") if sys.platform == "win32" else Path("bin/python")
    return next((place / inner / name for inner in ("", ".venv", "venv") if (place / inner / name).is_file()), place)
