"""One input at a time, in a process of its own: what came of it, what it took, what it left behind."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from random import Random
from typing import Any

from i2l_ext import runtime
from i2l_ext.converters.errors import UserError

SECONDS, MEGABYTES = 2.0, 500
"""What an input may take: of the processor's time, and of memory beyond what the process had before."""

LONGEST = 1000
"""Characters of a message that is still one clear line."""

HANG = 15.0
"""Seconds by the clock after which nothing more is expected; a process that ignores it is killed after twice that."""

SPACE = 6 << 30
"""Bytes of address space that an attacked process may add to its own, so that the machine survives a finding."""

THRESHOLD = 128 << 10
"""Bytes: what glibc begins with, for giving memory back."""


class Flaw(Exception):
    """A target's own finding: something is wrong although nothing was raised."""


class Hang(BaseException):
    """Raised by the alarm; nothing but the judge may catch it."""


@dataclass(frozen=True)
class Target:
    """What is attacked. ``start(folder)`` gives the function that makes an input from a random generator and the one
    that feeds it: ``feed(box, input)``, which may leave files named ``in*`` in the empty folder ``box``, and after a
    success also ``out*``; all else is astray. ``share``: of all inputs."""

    name: str
    what: str
    share: float
    start: Callable[[Path], tuple[Callable[[Random], Any], Callable[[Path, Any], None]]]


@dataclass(frozen=True)
class Finding:
    """An input that ended otherwise than it should."""

    target: str
    index: int
    kind: str
    said: str


@dataclass(frozen=True)
class Tally:
    """What came of a target's inputs; the slowest (seconds) and the hungriest (MB) of them."""

    inputs: int
    sound: int
    refused: int
    seconds: float
    megabytes: float
    findings: list[Finding]


NEXT, SOUND, REFUSED, SLOWEST, HUNGRIEST = range(5)


def attack(target: Target, count: int, seed: int, folder: Path, first: int = 0) -> Tally:
    """Inputs ``first`` to ``count`` of a target. A process that dies or hangs is a finding, and another goes on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = folder / "findings.jsonl"
    found.touch()
    numbers = RawArray("d", 5)
    numbers[NEXT] = first
    while int(numbers[NEXT]) < count:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _serve(target, count, seed, folder, numbers)
        kind = _watch(pid, numbers)
        if kind:
            _note(found, Finding(target.name, int(numbers[NEXT]), kind, _last(folder / "stderr")))
            numbers[NEXT] += 1
    findings = [Finding(**json.loads(line)) for line in found.read_text(encoding="utf-8").splitlines()]
    return Tally(
        count - first, int(numbers[SOUND]), int(numbers[REFUSED]), numbers[SLOWEST], numbers[HUNGRIEST], findings
    )


def _watch(pid: int, numbers: Any) -> str | None:
    """Why a process ended before its time; None where it did not."""
    at, since = numbers[NEXT], time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else f"ended with {code}"
        if numbers[NEXT] != at:
            at, since = numbers[NEXT], time.monotonic()
        if time.monotonic() - since > 2 * HANG:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hang"
        time.sleep(0.05)


def _serve(target: Target, count: int, seed: int, folder: Path, numbers: Any) -> None:
    """The attacked process. It does not return."""
    code = 70
    try:
        home, box = folder / "home", folder / "box"
        for made in (home, box):
            shutil.rmtree(made, ignore_errors=True)  # of one that died
            made.mkdir()
        _settle(home, folder / "stderr")
        make, feed = target.start(home)
        calm = sorted(home.rglob("*"))
        for index in range(int(numbers[NEXT]), count):
            numbers[NEXT] = index
            data = make(Random(f"{seed} {target.name} {index}"))
            with _room():
                flaw = _one(feed, box, data, numbers)
            if not flaw and (now := sorted(home.rglob("*"))) != calm:
                flaw, calm = ("astray", f"written beside: {sorted({*now} ^ {*calm})[:3]}"), now
            if flaw:
                _note(folder / "findings.jsonl", Finding(target.name, index, *flaw))
        numbers[NEXT] = count
        code = 0
    except BaseException:  # noqa: BLE001 - a fork must not return into its parent's code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _settle(home: Path, stderr: Path) -> None:
    """Folders of its own, stderr into a file, memory that goes back when it is freed, an alarm against hanging."""
    os.environ["MALLOC_TRIM_THRESHOLD_"] = str(THRESHOLD)  # commands leave a choice alone
    runtime.set_malloc_options({runtime.MMAP_THRESHOLD: THRESHOLD, runtime.TRIM_THRESHOLD: THRESHOLD})
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # what this process kept would hide what an input takes
    for name in ("TMPDIR", "HOME", "I2L_STATE", "I2L_MODELS", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        os.environ[name] = str(home)
    for name in ("I2L_CACHE", "TORCHINDUCTOR_CACHE_DIR"):  # what is written there is meant to be
        os.environ[name] = str(home.with_name("cache"))
    os.environ["DIFFSYNTH_MODEL_BASE_PATH"] = os.environ["MODELSCOPE_CACHE"] = str(home / "none")
    sink = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)

    def ring(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)


@contextmanager
def _room() -> Iterator[None]:
    """A bound on the address space."""
    now = _status("VmSize") << 10
    resource.setrlimit(resource.RLIMIT_AS, (now + SPACE, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _one(feed: Callable[[Path, Any], None], box: Path, data: Any, numbers: Any) -> tuple[str, str] | None:
    """Feed one input: the kind of flaw and what was said, or None."""
    flaw: tuple[str, str] | None = None
    allowed: tuple[str, ...] = ("in", "out")
    with suppress(OSError), Path("/proc/self/clear_refs").open("w") as stream:
        stream.write("5")  # so that the peak is this input's
    held, start = _status("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        feed(box, data)
        numbers[SOUND] += 1
    except UserError as error:
        numbers[REFUSED] += 1
        allowed, flaw = ("in",), unclear(str(error))
    except Hang:
        flaw = "hang", "".join(traceback.format_exc()[-600:])
    except Flaw as error:
        flaw = "flaw", str(error)[:600]
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what we are here for
        flaw = "traceback", f"{type(error).__name__}: {error}"[:300] + " | " + _where(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, megabytes = time.process_time() - start, max(_status("VmHWM") - held, 0) / 1024
    numbers[SLOWEST], numbers[HUNGRIEST] = max(numbers[SLOWEST], seconds), max(numbers[HUNGRIEST], megabytes)
    left = sorted(path.name for path in box.iterdir() if not path.name.startswith(allowed))
    if left and not flaw:
        flaw = "astray", ", ".join(left)[:300]
    if megabytes > MEGABYTES and not flaw:
        flaw = "hungry", f"{megabytes:.0f} MB"
    if seconds > SECONDS and not flaw:
        flaw = "slow", f"{seconds:.1f} s"
    for path in box.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return flaw


def unclear(message: str) -> tuple[str, str] | None:
    """Why a message is not one clear line that any terminal can show, or None."""
    if not message.strip() or "\n" in message or len(message) > LONGEST:
        return "message", f"{len(message)} characters: {message[:200]!r}"
    strange = [char for char in message if not char.isprintable()]
    return ("message", f"holds {strange[0]!a}: {message[:200]!a}") if strange else None


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))


def _status(name: str) -> int:
    """A size from /proc, in KB."""
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name + ":")), 0)


def _note(path: Path, finding: Finding) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(finding)) + "\n")


def _last(path: Path) -> str:
    return path.read_text(errors="replace")[-600:] if path.exists() else ""
