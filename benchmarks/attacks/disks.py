"""Disks that fill, fail and forget, folders that only let one read, clocks that jump, and others at the same file."""

from __future__ import annotations

import builtins
import errno
import io
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from attacks import shelf
from attacks.judge import unclear
from attacks.kills import Deed
from i2l_ext.commands.main import main
from i2l_ext.converters.errors import UserError


@dataclass
class Trouble:
    """How many times something was tried, how often the deed was done all the same, and what was wrong."""

    tried: int = 0
    done: int = 0
    harm: list[str] = field(default_factory=list)


def _held(deed: Deed, here: Path, work: Callable[[], int], said: Path, trouble: Trouble, title: str) -> None:
    """Do ``work`` in a fork, and hold the folder and the words against what they should be."""
    before, at = shelf.state(here), said.stat().st_size if said.exists() else 0
    code = shelf.ended(shelf.forked(work, said))
    words = said.read_text(errors="replace")[at:]
    trouble.tried += 1
    trouble.done += code == 0
    if code not in (0, 1) or "Traceback" in words:
        trouble.harm.append(f"{title}: ends with {code}: {words[-300:]}")
    if code == 1:
        last = words.strip().splitlines()[-1] if words.strip() else ""
        if flaw := unclear(last):
            trouble.harm.append(f"{title}: {flaw[1]}")
        if (after := shelf.state(here)) != before:
            trouble.harm.append(f"{title}: refused, but changed {sorted({*after.items()} ^ {*before.items()})[:3]}")
        trouble.harm += [f"{title}: left {name}" for name in shelf.left(here)]
    trouble.harm += [f"{title}: {found}" for found in shelf.harm(before, here, deed.may_change)]


# --- a disk of a few pages --------------------------------------------------------------------------------------


@contextmanager
def small_disk(at: Path, size: int) -> Iterator[Path]:
    """A file system in memory of so many bytes. Raises OSError where this user may not mount one."""
    at.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], capture_output=True).returncode:
        raise PermissionError(errno.EPERM, "may not mount")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def filling(deed: Deed, times: int, folder: Path) -> Trouble:
    """The deed on disks that have room for more and more pages beyond what lies there."""
    trouble, said = Trouble(), folder.parent / f"{deed.name}-full.said"
    model = folder / "model"
    deed.lay(model)
    least = sum(-(-path.stat().st_size // 4096) * 4096 for path in model.rglob("*") if path.is_file())
    if code := shelf.ended(shelf.forked(partial(deed.do, model), said)):
        raise RuntimeError(f"{deed.name} ends with {code} undisturbed: {said.read_text()[-800:]}")
    most = sum(-(-path.stat().st_size // 4096) * 4096 for path in model.rglob("*") if path.is_file())
    step = max((most - least) // times, 4096)
    for number in range(times + 2):
        with small_disk(folder / "disk", least + (1 << 16) + number * step) as disk:
            here = disk / "d"
            try:
                deed.lay(here)
            except (OSError, UserError):
                continue
            _held(deed, here, partial(deed.do, here), said, trouble, f"{number * step >> 10} KB of room")
    return trouble


def read_only(deed: Deed, folder: Path) -> Trouble:
    """The deed in a folder that only lets one read."""
    trouble, said = Trouble(), folder.parent / f"{deed.name}-ro.said"
    with small_disk(folder / "disk", 1 << 28) as disk:
        deed.lay(disk / "d")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        _held(deed, disk / "d", partial(deed.do, disk / "d"), said, trouble, "read-only")
    return trouble


# --- a fake at the file interface -------------------------------------------------------------------------------


@dataclass
class Fault:
    """What goes wrong with files below ``folder``: after ``after`` bytes (read or written, all files together) the
    error ``code``, once; with ``short`` no read gives more than a few bytes at a time."""

    folder: Path
    after: int = 1 << 60
    code: int = errno.EIO
    writes: bool = True
    short: bool = False
    passed: int = 0

    def pass_on(self, count: int) -> None:
        self.passed += count
        if self.passed > self.after:
            self.after = 1 << 60
            raise OSError(self.code, os.strerror(self.code))


class Faulty(io.FileIO):
    """A file on a disk with a fault."""

    fault: Fault

    def readinto(self, buffer: Any) -> int | None:
        if not self.fault.writes:
            self.fault.pass_on(len(buffer))
        view = memoryview(buffer).cast("B")
        return super().readinto(view[: max(1, len(view) // 3)] if self.fault.short else view)

    def read(self, size: int = -1) -> bytes | None:
        if size < 0:
            return self.readall()
        buffer = bytearray(size)
        count = self.readinto(buffer)
        return None if count is None else bytes(buffer[:count])

    def readall(self) -> bytes:
        pieces = []
        while piece := self.read(1 << 16):
            pieces.append(piece)
        return b"".join(pieces)

    def write(self, data: Any) -> int | None:
        view = memoryview(data).cast("B")
        if self.fault.writes:
            self.fault.pass_on(len(view))
        return super().write(view)


@contextmanager
def faulty(fault: Fault) -> Iterator[None]:
    """Python's own open gives files with this fault, for as long as the block lasts."""
    plain = io.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **options: Any) -> Any:
        if not isinstance(file, (str, os.PathLike)) or str(fault.folder) not in os.fspath(file):
            return plain(file, mode, buffering, *more, **options)
        raw = Faulty(file, mode.replace("b", "").replace("t", ""))
        raw.fault = fault
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        buffered = kind(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **options)

    with mock.patch.object(io, "open", opened), mock.patch.object(builtins, "open", opened):
        accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 keeps its own
        with mock.patch.object(accessor, "open", staticmethod(opened)) if accessor else nullcontext():
            yield


def failing(deed: Deed, times: int, seed: int, folder: Path, code: int, *, writes: bool) -> Trouble:
    """The deed with one error at a random byte of all that is read, or written, in its folder."""
    random, trouble = Random(f"{seed} {deed.name} {code} {writes}"), Trouble()
    said = folder.parent / f"{deed.name}-fail.said"
    total = _bytes(deed, folder / "whole", writes)
    for number in range(times):
        here = folder / f"n{number}"
        deed.lay(here)
        fault = Fault(here, random.randrange(total + 1), code, writes)

        def work(here: Path = here, fault: Fault = fault) -> int:
            with faulty(fault):
                return deed.do(here)

        _held(deed, here, work, said, trouble, f"{os.strerror(code)} at byte {fault.after}")
        again = shelf.ended(shelf.forked(partial(deed.do, here), said))
        if again:
            trouble.harm.append(f"the run after {os.strerror(code)} at byte {fault.after} ends with {again}")
    return trouble


def _bytes(deed: Deed, here: Path, writes: bool) -> int:
    """How many pass in all; counted in a fork, as the deed may change what it has loaded."""
    deed.lay(here)
    note = here.parent / "bytes"

    def work() -> int:
        fault = Fault(here, writes=writes)
        with faulty(fault):
            code = deed.do(here)
        note.write_text(str(fault.passed))
        return code

    if shelf.ended(shelf.forked(work, here.parent / "bytes.said")):
        raise RuntimeError((here.parent / "bytes.said").read_text()[-500:])
    return int(note.read_text())


def short(deed: Deed, folder: Path) -> Trouble:
    """The deed with reads that give a third of what is asked for: the same result, byte for byte."""
    trouble, said = Trouble(tried=1), folder.parent / f"{deed.name}-short.said"
    results = []
    for name, fault in (("plain", None), ("short", Fault(folder / "d", short=True))):
        here = folder / "d"
        deed.lay(here)

        def work(here: Path = here, fault: Fault | None = fault) -> int:
            with faulty(fault) if fault else nullcontext():
                return deed.do(here)

        code = shelf.ended(shelf.forked(work, said))
        trouble.harm += [f"{name} reads: ends with {code}: {said.read_text()[-300:]}"] if code else []
        results.append({name: digest for name, digest in shelf.state(here).items() if name.endswith(".safetensors")})
        here.rename(folder / name)
    if results[0] != results[1]:
        trouble.harm.append("short reads give another result")
    trouble.done = not trouble.harm
    return trouble


# --- clocks -----------------------------------------------------------------------------------------------------

JUMPS = (-10 * 365 * 86400.0, -86400.0, -3.0, 0.0, 3600.0, 3 * 86400.0, 40 * 365 * 86400.0)
"""Seconds by which a clock may jump."""


@contextmanager
def jumping(random: Random) -> Iterator[None]:
    """time.time, as every module here asks for it, that jumps now and then; files keep the system's time."""
    from i2l_ext.encoders import cache

    plain, now = time.time, 0.0

    def told() -> float:
        nonlocal now
        if random.random() < 0.3:
            now = random.choice(JUMPS)
        return plain() + now

    with mock.patch.object(time, "time", told), mock.patch.object(cache, "time", told):
        yield


def jumps(deed: Deed, times: int, seed: int, folder: Path) -> Trouble:
    """The deed while the clock jumps: it is done all the same."""
    trouble, said = Trouble(), folder.parent / f"{deed.name}-clock.said"
    for number in range(times):
        here = folder / f"n{number}"
        deed.lay(here)

        def work(here: Path = here, number: int = number) -> int:
            with jumping(Random(f"{seed} {number}")):
                return deed.do(here)

        _held(deed, here, work, said, trouble, f"clock {number}")
    if trouble.done != trouble.tried:
        trouble.harm.append(f"{trouble.tried - trouble.done} were not done")
    return trouble


# --- others at the same file ------------------------------------------------------------------------------------


def together(
    do: Callable[[Path, int], int],
    lay: Callable[[Path], object],
    times: int,
    folder: Path,
    winners: int,
    may_change: Callable[[str], bool] = lambda name: False,
) -> Trouble:
    """Two processes do the same at once; ``winners`` of them are to succeed, the other is refused in one line."""
    trouble, said = Trouble(), folder.parent / f"{folder.name}.said"
    for number in range(times):
        here = folder / f"n{number}"
        lay(here)
        before = shelf.state(here)
        gate, opened = os.pipe()

        def work(which: int, here: Path = here, gate: int = gate, opened: int = opened) -> int:
            os.close(opened)
            os.read(gate, 1)  # until the parent closes its end
            return do(here, which)

        pids = [shelf.forked(partial(work, which), said) for which in range(2)]
        os.close(opened)
        os.close(gate)
        codes = sorted(shelf.ended(pid) for pid in pids)
        trouble.tried += 1
        trouble.done += codes.count(0)
        if codes != [0] * winners + [1] * (2 - winners):
            trouble.harm.append(f"{number}: they end with {codes}: {said.read_text()[-300:]}")
        trouble.harm += [f"{number}: {found}" for found in shelf.harm(before, here, may_change)]
        trouble.harm += [f"{number}: left {name}" for name in shelf.left(here)]
    return trouble


SPOILERS = ("rename", "rewrite", "truncate", "grow", "remove")


def spoiled(times: int, seed: int, folder: Path) -> Trouble:
    """A LoRA that another process replaces, rewrites, cuts, lengthens or removes again and again while it is converted
    and looked at: the result is that of one of the two files, or one clear refusal."""
    trouble, said = Trouble(), folder.parent / "spoiled.said"
    first, second = (
        shelf.lora(folder / f"{name}.safetensors", "z-image", seed=number, modules=40)
        for number, name in enumerate("ab")
    )
    wanted = set()
    for source in (first, second):
        copy, out = folder / "source.safetensors", folder / "out.safetensors"
        copy.write_bytes(source.read_bytes())
        main(["convert", str(copy), "--to", "kohya", "-o", str(out), "--overwrite"])
        wanted.add(_tensors(out))
        out.unlink()
    for kind in SPOILERS:
        pid = shelf.forked(partial(_spoil, kind, folder, Random(f"{seed} {kind}")), said)
        try:
            for _ in range(times):
                out = folder / "out.safetensors"
                trouble.tried += 1
                try:
                    with (
                        mock.patch.object(sys, "stdout", io.StringIO()),
                        mock.patch.object(sys, "stderr", io.StringIO()) as err,
                    ):
                        code = main(["convert", str(folder / "source.safetensors"), "--to", "kohya", "-o", str(out)])
                    if code == 0:
                        trouble.done += 1
                        if _tensors(out) not in wanted:
                            trouble.harm.append(f"{kind}: a mixture of two files was written")
                        out.unlink()
                    elif flaw := unclear(err.getvalue().strip()):
                        trouble.harm.append(f"{kind}: {flaw[1]}")
                except Exception as error:  # noqa: BLE001 - it is a finding
                    trouble.harm.append(f"{kind}: {type(error).__name__}: {error}")
                trouble.harm += [f"{kind}: left {name}" for name in shelf.left(folder)]
        finally:
            os.kill(pid, 9)
            shelf.ended(pid)
    return trouble


def _tensors(path: Path) -> tuple[tuple[str, int], ...]:
    from safetensors.torch import load_file

    return tuple(sorted((name, hash(tensor.numpy().tobytes())) for name, tensor in load_file(path).items()))


def _spoil(kind: str, folder: Path, random: Random) -> int:
    source, contents = folder / "source.safetensors", [(folder / f"{name}.safetensors").read_bytes() for name in "ab"]
    while True:
        data = random.choice(contents)
        with suppress(OSError):
            if kind == "rename" or not source.exists():
                other = folder / "other"
                other.write_bytes(data)
                other.replace(source)
            elif kind == "rewrite":
                source.write_bytes(data)
            elif kind == "truncate":
                os.truncate(source, random.randrange(len(data)))
                time.sleep(0.002)
                source.write_bytes(data)
            elif kind == "grow":
                with source.open("ab") as stream:
                    stream.write(b"more")
                time.sleep(0.002)
                source.write_bytes(data)
            else:
                source.unlink()
        time.sleep(random.uniform(0.012, 0.03))  # two writes within a tick of the kernel's clock look like one
