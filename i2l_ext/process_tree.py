"""A process with all its descendants: what they take, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

END_SECONDS = 10.0
"""How long the killed are waited for: one that reads from a lost share dies only when the system lets it."""

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Usage:
    """``memory``: bytes resident, shared pages counted for each; ``processes``: how many there are."""

    memory: int
    processes: int


class Tree:
    """The descendants of a process, on Linux. Elsewhere they are not seen: the usage is 0."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.seen: dict[int, str] = {}
        """The start of every process of the tree, by its number: numbers are used again."""

    def measure(self) -> Usage:
        """What is taken now. Processes that left their parent are known from an earlier look."""
        memory = count = 0
        running = _processes()
        for pid, one in running.items():
            known = self.seen.get(pid) == one.start
            if known or pid == self.root or one.parent in self.seen:
                self.seen[pid] = one.start
                memory += one.resident
                count += 1
        self.seen = {pid: start for pid, start in self.seen.items() if pid in running and running[pid].start == start}
        return Usage(memory, count)


class _Process(NamedTuple):
    parent: int
    start: str
    resident: int


def _processes() -> dict[int, _Process]:
    """Every process that runs by its number, parents first (as far as numbers grow). One that has ended and whose
    parent has not asked for its end is none."""
    found: dict[int, _Process] = {}
    entries = [one for one in Path("/proc").iterdir() if one.name.isdigit()] if Path("/proc/self/stat").exists() else []
    for entry in sorted(entries, key=lambda one: int(one.name)):
        with suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found[int(entry.name)] = _Process(int(fields[1]), fields[19], int(fields[21]) * PAGE)
    return found


def supervised(words: Sequence[str]) -> list[str]:
    """The command that runs ``words`` and ends them, with all that they start, as soon as its own stdin is closed, as
    it is when who started it has been killed."""
    root = str(Path(__file__).resolve().parents[1])
    start = f"import sys; sys.path.insert(0, {root!r}); from i2l_ext.process_tree import supervise; supervise()"
    return [sys.executable, "-c", start, *words]


def supervise() -> None:
    """Run the command of the own arguments until it ends, or stdin does; then exit as it does."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    tree = Tree(process.pid)

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        end_tree(process, tree)
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
    while process.poll() is None:
        tree.measure()  # who leaves the session is known from an earlier look
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    os._exit(process.returncode & 0xFF)


def end_tree(process: subprocess.Popen[Any], tree: Tree) -> None:
    """End the process and all that descend from it, and wait until they are gone (on Linux, END_SECONDS at most). In a
    process namespace the kernel does it with the first."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
    else:
        end = time.monotonic() + END_SECONDS
        left = tree.measure().processes
        _kill(process.pid, tree)
        while left and time.monotonic() < end:
            time.sleep(0.01)
            left = tree.measure().processes
            _kill(process.pid, tree)  # one of them may just have started another
    process.kill()
    process.wait()


def _kill(group: int, tree: Tree) -> None:
    if sys.platform != "win32":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        for pid in tree.seen:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
