"""How fast weights are read, beside a plain sequential read, on disks and systems as people have them.

    python benchmarks/disks.py --megabytes 256 --rounds 3

Groups of tensors are read as encoders read them, and nothing is computed. This machine's own disk is timed first, out
of the page cache, in the ways in which a system may have to read. Then come disks that are emulated
(tests/slow_disks.py): each call waits, gives fewer bytes, or moves the head. The plain read is one thread that asks for
16 MB after 16 MB. At least 0.9 of its rate is asked; the command ends with 1 below that.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest import mock

from bench import in_turns, out_of_cache, random_file

# isort: split
from i2l_ext.weights import files as tensor_files
from i2l_ext.weights.compute import DEFAULT_OPTIONS
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.reads import READ_SIZE
from i2l_ext.weights.stream import stream
from results import record, table
from slow_disks import SYSTEMS, SlowDisk, system

LEAST = 0.9
MB = 1e6

DISKS = {
    "hard disk": partial(SlowDisk, rate=150 * MB, seek=0.010),
    "network share": partial(SlowDisk, rate=100 * MB, latency=0.005, most=1 << 20),
    "slow network": partial(SlowDisk, rate=30 * MB, latency=0.040),
    "WSL, a drive of Windows": partial(SlowDisk, rate=300 * MB, latency=0.002, most=1 << 18),
    "SD card": partial(SlowDisk, rate=40 * MB, latency=0.001),
}
"""Bytes a second, seconds to wait or to move, bytes a call."""


def ours(path: Path, groups: list[dict[str, str]]) -> None:
    with TensorFiles([path]) as files:
        for _ in stream(files, groups, DEFAULT_OPTIONS):
            pass


def plain(path: Path, disk: SlowDisk | None) -> None:
    """One thread from the first byte to the last."""
    area, at = memoryview(bytearray(READ_SIZE)), 0
    with path.open("rb", buffering=0) as file:
        while True:
            count = disk.read(file.fileno(), area, at) if disk else file.readinto(area)
            if not count:
                return
            at += count


def compared(path: Path, groups: list[dict[str, str]], disk: SlowDisk | None, kind: str, rounds: int) -> list[object]:
    """Megabytes a second of both, and their ratio. Without a ``disk`` this machine's own, out of the page cache."""
    if disk:
        way: AbstractContextManager[object] = system(kind, disk)
    else:
        way = mock.patch.object(tensor_files, "exceeds_page_cache", lambda size: kind == "past it")
    with way:
        jobs = {"ours": lambda: ours(path, groups), "plain": lambda: plain(path, disk)}
        seconds = in_turns(jobs, rounds, before=lambda: out_of_cache([path]))
    ratio = statistics.median(p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True))
    size = path.stat().st_size / MB
    return [kind, *(f"{size / statistics.median(seconds[who]):.0f}" for who in ("ours", "plain")), f"{ratio:.2f}"]


def measure(folder: Path, megabytes: int, rounds: int) -> list[list[object]]:
    """A row for each disk and way of reading."""
    numbers = 1 << 20
    shapes = {f"t{number}": (1024, numbers // 1024) for number in range(max(megabytes * 1000**2 // (2 * numbers), 8))}
    path = random_file(folder / "weights.safetensors", shapes)
    keys = list(shapes)
    groups = [{key: key for key in keys[start : start + 16]} for start in range(0, len(keys), 16)]
    rows = [["this machine's", *compared(path, groups, None, kind, rounds)] for kind in SYSTEMS[:2]]
    rows += [["this machine's", *compared(path, groups, SlowDisk(), kind, rounds)] for kind in SYSTEMS[2:]]
    for title, disk in DISKS.items():
        rows += [[title, *compared(path, groups, disk(), kind, 1)] for kind in SYSTEMS]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="on this machine's disk; each emulated one is timed once")
    parser.add_argument("--dir", type=Path, help="where to write the weights (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        rows = measure(Path(folder), args.megabytes, args.rounds)
    text = (
        f"{args.megabytes} MB, read as an encoder's layers are, megabytes a second; the disks after this machine's are "
        "emulated.\n\n"
    )
    record(
        "Reading, beside a plain sequential read",
        text + table(["disk", "how", "ours", "plain", "ours / plain"], rows),
        script=__file__,
    )
    return int(any(float(str(row[-1])) < LEAST for row in rows))


if __name__ == "__main__":
    sys.exit(main())
