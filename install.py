"""Set-up, with the standard library only.

    python install.py          the WebUI's part: the WebUI runs it at every launch
    python install.py demo     makes .venv, installs, turns sample pictures into a LoRA and draws with it
    python install.py test     makes .venv, installs what the tests need, runs the checks and all tests
    python install.py browser  the same for the tests of the tab in a real browser, in four gradios
    python install.py ui       makes .venv, installs, serves the tab without a WebUI

Versions are exact, and files are checked by their hashes (requirements/), but for torch, whose builds differ. The
WebUI's packages are never touched: what its Python lacks goes into a folder that only the engine's own process sees.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Collection, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements"
LOCKS = {"mini": ("mini",), "mini,ui": ("mini", "ui"), "test": ("mini", "ui", "test", "peers")}
"""Extras -> the files of requirements/ that hold them: each adds to the last."""
PRIVATE = ROOT / ".private" / "site-packages"
A_DAY = 24 * 3600
TOO_NEW = (3, 15)
"""The first Python that pyproject.toml refuses. A WebUI's own is not asked: pip says what cannot be had for it."""


class Need(NamedTuple):
    """What the engine needs of a host's Python: from which version on, and what comes with a newer one because it has
    to fit."""

    oldest: str
    brings: tuple[str, ...] = ()


NEEDS = {
    "transformers": Need("4.56", ("tokenizers", "huggingface-hub", "hf-xet", "safetensors", "regex", "tqdm")),
    "huggingface-hub": Need("0.34", ("hf-xet",)),
    "safetensors": Need("0.4.3"),
    "platformdirs": Need("3"),
    "tqdm": Need("4"),
    "diffusers": Need("0.37", ("importlib-metadata", "zipp", "accelerate", "peft")),
}
"""Diffusers is there to draw with the miniature: from 0.37 on it heeds the mask of the words."""

MEGABYTES = {
    "accelerate": (0.4, 1.6), "diffusers": (5.6, 24.7), "hf-xet": (3.3, 8.3), "huggingface-hub": (0.6, 2.3),
    "importlib-metadata": (0.1, 0.1), "peft": (0.8, 3.0), "platformdirs": (0.1, 0.2), "regex": (0.8, 3.0),
    "safetensors": (0.5, 1.2), "tokenizers": (3.3, 10.3), "tqdm": (0.1, 0.2), "transformers": (12.0, 52.4),
    "zipp": (0.1, 0.1),
}  # fmt: skip
"""Of what requirements/host.txt names: to download, and on the disk, before Python compiles what it uses."""


def main(arguments: Sequence[str]) -> int:
    task, *rest = arguments or ("host",)
    if task in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if task not in TASKS:
        print(f"There is no task {task!r}. There are: {', '.join(TASKS)}.", file=sys.stderr)
        return 2
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs this has not read pyproject.toml
        print(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}.", file=sys.stderr)
        return 1
    if task != "host" and sys.version_info >= TOO_NEW:
        running, newest = sys.version.split()[0], TOO_NEW[1] - 1
        print(f"Python 3.{newest} or older is needed; this is {running}. Install 3.13 beside it.", file=sys.stderr)
        return 1
    try:
        return TASKS[task](rest)
    except subprocess.CalledProcessError as error:
        print(f"Set-up stopped: {' '.join(map(str, error.cmd[1:4]))} … failed (see above).", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Set-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def host(_: Sequence[str]) -> int:
    """The WebUI's part. Nothing is done, and nothing printed, where its Python has all that the engine needs."""
    sys.path.insert(0, str(ROOT))  # an embedded Python, as WebUIs bring, does not look beside the script
    from i2l_ext import private_packages

    lacking = [name for name, need in NEEDS.items() if _version(name) < _numbers(need.oldest)]
    taken = sorted({*lacking, *(one for name in lacking for one in NEEDS[name].brings)})
    if not lacking or private_packages.is_current(PRIVATE, taken):
        return 0
    down, kept = (sum(MEGABYTES[name][at] for name in taken) for at in (0, 1))
    print(f"Image to LoRA: installing newer {', '.join(lacking)} into a folder of its own", flush=True)
    print(f"Image to LoRA: {down:.1f} MB to download, {kept:.1f} MB on the disk: {', '.join(taken)}", flush=True)
    try:
        PRIVATE.parent.mkdir(parents=True, exist_ok=True)
        for left in PRIVATE.parent.glob("new-*"):  # of a set-up that was killed
            if time.time() - left.stat().st_mtime > A_DAY:
                shutil.rmtree(left, ignore_errors=True)
        # a fresh folder takes the place of the old one when it is whole: nobody ever sees half of one
        with tempfile.TemporaryDirectory(dir=PRIVATE.parent, prefix="new-", ignore_cleanup_errors=True) as aside:
            fresh, wanted = Path(aside) / "new", Path(aside) / "wanted.txt"
            fresh.mkdir()
            wanted.write_text(_pins_of(taken, private_packages.PINS.read_text(encoding="utf-8")), encoding="utf-8")
            command = ("install", "--quiet", "--no-deps", "--no-compile", "--target", fresh, *_hashed(wanted))
            subprocess.run([sys.executable, "-m", "pip", *map(str, command)], check=True)
            (fresh / private_packages.STAMP).write_text(private_packages.stamp(taken), encoding="utf-8")
            old = Path(aside) / "old"
            if PRIVATE.exists():
                PRIVATE.rename(old)
            try:
                fresh.rename(PRIVATE)
            except OSError:  # on Windows a scanner may have a new file open
                if old.exists():
                    old.rename(PRIVATE)
                raise
    except (subprocess.CalledProcessError, OSError):
        print(
            "Image to LoRA: that could not be installed (see pip above). The WebUI is unchanged; restart it to retry."
        )
    return 0


def _refuse_wrong_options(task: str, rest: Sequence[str]) -> None:
    """A slip in them is told before minutes of installing: this ends with 2 then, and with 0 after --help."""
    sys.path.insert(0, str(ROOT))
    from i2l_ext.commands.main import parser

    parser().parse_args([task, *rest])


def demo(rest: Sequence[str]) -> int:
    _refuse_wrong_options("demo", rest)
    python = _environment("mini")
    return subprocess.run([python, "-m", "i2l_ext", "demo", *rest]).returncode  # in the folder where the user is


def test(rest: Sequence[str]) -> int:
    python = _environment("test")
    steps = ["-m pytest"] if rest else CHECKS
    codes = [subprocess.run([python, *step.split(), *rest], cwd=ROOT).returncode for step in steps]
    return next(filter(None, codes), 0)


def browser(rest: Sequence[str]) -> int:
    python = _environment("test")
    _browser()
    for version in GRADIOS:
        _gradio(version)
    command = [python, "-m", "pytest", *(rest or ("tests/browser",))]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "I2L_BROWSER": "1"}).returncode


def ui(rest: Sequence[str]) -> int:
    _refuse_wrong_options("ui", rest)
    with subprocess.Popen([_environment("mini,ui"), "-m", "i2l_ext", "ui", *rest], cwd=ROOT) as page:
        signal.signal(signal.SIGTERM, lambda *_: page.terminate())  # else it would live on, and keep the port
        while True:
            with suppress(KeyboardInterrupt):  # the page gets it too, and ends by itself
                return page.wait()


CHECKS = ("-m ruff check --quiet", "-m ruff format --check --quiet", "tests/measured.py --all")
"""All of them, whatever the first ones say. The last runs all tests, those of four parts under coverage; the types are
held by a test (tests/test_types.py)."""

NO_CUDA = """There is an NVIDIA card, which PyPI's torch for Windows does not use. To use it, run this again after
    set I2L_TORCH_INDEX=https://download.pytorch.org/whl/cu130
in PowerShell
    $env:I2L_TORCH_INDEX = "https://download.pytorch.org/whl/cu130"
or another index that fits the card: https://pytorch.org/get-started/locally. It is remembered."""

GRADIOS = ("3.41", "3.43", "4.40")
"""The hosts' versions, as the browser tests need them (requirements/gradio-*.txt)."""

TASKS = {"host": host, "demo": demo, "test": test, "browser": browser, "ui": ui}


def _environment(extras: str) -> str:
    """The Python of .venv, with this checkout and what ``extras`` need installed at the locked versions."""
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.is_file():
        print(f"Making {ENVIRONMENT.name}", flush=True)
        venv.EnvBuilder(with_pip=True, clear=ENVIRONMENT.exists()).create(ENVIRONMENT)
    locks = [REQUIREMENTS / f"{'' if name == 'peers' else 'lock-'}{name}.txt" for name in LOCKS[extras]]
    torch = REQUIREMENTS / "torch.txt"
    named = ENVIRONMENT / "i2l-torch-index.txt"
    before = named.read_text(encoding="utf-8") if named.is_file() else ""
    index = os.environ.get("I2L_TORCH_INDEX", before)
    wanted = _digest(*locks, torch, ROOT / "pyproject.toml") + index
    stamp = ENVIRONMENT / f"i2l-{extras.replace(',', '-')}.sha256"
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted):
        here = [*ENVIRONMENT.glob("lib/python*/site-packages/torch"), *ENVIRONMENT.glob("Lib/site-packages/torch")]
        more = "" if here and index == before else "; torch is large, so this takes some minutes"
        print(f"Installing exact versions{more}", flush=True)
        if sys.platform == "win32" and not index and shutil.which("nvidia-smi"):
            print(NO_CUDA, flush=True)
        stamp.unlink(missing_ok=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", *_hashed(*locks)], check=True)
        elsewhere = ("--upgrade", "--index-url", index) if index else ()  # the same version there counts as a newer one
        subprocess.run([*pip, "--only-binary=:all:", *elsewhere, "-r", str(torch)], check=True)
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)], check=True)
        named.write_text(index, encoding="utf-8")
        stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def _gradio(version: str) -> None:
    """A host's gradio in an environment of its own, for the browser tests; they skip what cannot be had here."""
    folder, lock = ROOT / ".private" / f"gradio-{version}", REQUIREMENTS / f"gradio-{version}.txt"
    stamp, wanted = folder / "i2l.sha256", _digest(lock)
    if os.name == "nt" or (stamp.is_file() and stamp.read_text() == wanted):
        return
    print(f"Installing gradio {version} for the browser tests", flush=True)
    venv.EnvBuilder(with_pip=True, clear=True).create(folder)
    pip = (str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", *_hashed(lock))
    if subprocess.run(pip).returncode:
        print(f"gradio {version} cannot be installed here (it wants Python 3.11): its tests are skipped.")
    else:
        stamp.write_text(wanted)


def _browser() -> None:
    """Debian's Chromium, where it is missing and we may install it; without it the browser tests are skipped."""
    apt = shutil.which("apt-get")
    if apt and not shutil.which("chromium") and getattr(os, "geteuid", lambda: 1)() == 0:
        print("Installing Chromium for the browser tests", flush=True)
        subprocess.run([apt, "update", "-qq"], stdout=subprocess.DEVNULL)
        subprocess.run([apt, "install", "-y", "-qq", "chromium"], stdout=subprocess.DEVNULL)


def _hashed(*files: Path) -> list[str]:
    """For pip: take what is in ``files`` and nothing else, hold each file that comes against its hashes, and run no
    code of it: no source that would have to be built."""
    return ["--require-hashes", "--only-binary=:all:", *(word for file in files for word in ("-r", str(file)))]


def _pins_of(names: Collection[str], pins: str) -> str:
    """The lines of a requirements file that are about these packages."""
    blocks = re.findall(r"^([a-z0-9._-]+)(==.*(?:\n .*)*)", pins, re.MULTILINE)
    return "".join(f"{name}{rest}\n" for name, rest in blocks if name in names)


def _digest(*files: Path) -> str:
    """What tells whether these files, or the Python, have changed."""
    return hashlib.sha256(b"\0".join((*(file.read_bytes() for file in files), sys.version.encode()))).hexdigest()


def _version(name: str) -> tuple[int, ...]:
    """The installed version of a distribution; () where it is missing."""
    try:
        return _numbers(metadata.version(name))
    except metadata.PackageNotFoundError:
        return ()


def _numbers(version: str) -> tuple[int, ...]:
    """Version 4.56.1rc1 gives (4, 56, 1)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
