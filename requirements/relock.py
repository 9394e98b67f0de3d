"""Writes the files of this folder: exact versions, with the hashes of all files of each release.

    pip install uv; python requirements/relock.py [--upgrade]

Versions stay as they are, but for what pyproject.toml no longer allows or newly asks for; with --upgrade all are the
newest. A release's hashes are those of its source and of all its wheels, so that one file serves every system and
every Python from 3.10 to 3.14. What the set-up of one purpose needs beyond that of the last is a file of its own.

Torch has no hashes: which of its builds is right depends on the machine, and they come from different indexes. The
CUDA packages belong to its build, which names their exact versions.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent / "pyproject.toml"

SETS = {"mini": ("mini",), "ui": ("mini", "ui"), "test": ("test",)}
"""File's name -> the extras that it, with those before it, serves."""

BUILD = "hatchling\neditables\n"
ALONE = {
    "host": "3.10",
    "peers": "3.10.1",
    "diffsynth": "3.10.1",
    "gradio-3.41": "3.11",
    "gradio-3.43": "3.11",
    "gradio-4.40": "3.11",
}
"""Files with versions of their own, installed without dependencies -> oldest Python."""

_UNHASHED = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")
_BLOCK = re.compile(r"^([a-z0-9][a-z0-9._-]*)==.*(?:\n .*)*", re.MULTILINE)


def compile(source: Path | str, *options: str, python: str = "3.10") -> str:
    """What uv makes of ``source``, for every system."""
    command = ["uv", "pip", "compile", str(source), *options, "--universal", "--python-version", python]
    quiet = ("--no-annotate", "--no-header", "--quiet", "--no-config")
    return subprocess.run([*command, *quiet], check=True, capture_output=True, text=True).stdout


def blocks(text: str) -> dict[str, str]:
    """{name: its lines}, one set of lines for each marker."""
    found: dict[str, str] = {}
    for match in _BLOCK.finditer(text):
        if not _UNHASHED.match(match[1]):
            found[match[1]] = found.get(match[1], "") + match[0] + "\n"
    return found


def head(file: Path) -> str:
    """The comment that begins a file."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])


def main() -> None:
    files = {name: HERE / f"lock-{name}.txt" for name in SETS}
    with tempfile.TemporaryDirectory() as folder:
        build, pins = Path(folder, "build.txt"), Path(folder, "pins.txt")
        build.write_text(BUILD, encoding="utf-8")
        pins.write_text("".join(_plain(path) for path in files.values()), encoding="utf-8")
        kept = () if "--upgrade" in sys.argv else ("--constraints", str(pins))
        torch = ("--constraints", str(HERE / "torch.txt"))
        whole = compile(PROJECT, str(build), "--extra", "test", "--generate-hashes", *torch, *kept)
        pins.write_text(re.sub(r" \\\n( .*\n?)*", "\n", whole), encoding="utf-8")
        releases, done = blocks(whole), set[str]()
        for name, extras in SETS.items():
            chosen = [word for extra in extras for word in ("--extra", extra)]
            needed = blocks(compile(PROJECT, str(build), *chosen, "--constraints", str(pins))).keys() - done
            text = "".join(releases[one] for one in sorted(needed))
            files[name].write_text(head(files[name]) + text, encoding="utf-8")
            done |= needed
    for name, python in ALONE.items():
        file = HERE / f"{name}.txt"
        file.write_text(head(file) + compile(file, "--no-deps", "--generate-hashes", python=python), encoding="utf-8")


def _plain(file: Path) -> str:
    """The versions alone."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return "".join(f"{line.rstrip(chr(92)).strip()}\n" for line in lines if line and line[0] not in "# ")


if __name__ == "__main__":
    main()
