"""What lies in the LoRA folder after processes were killed, disks filled and failed, clocks jumped and others wrote.

    python benchmarks/faults.py [--kills 200] [--real 10] [--seed 0] [--only PART] [--record]

Afterwards every file there is the old one or a complete new one, nothing else was touched, and the next run works
without cleaning by hand. ``--kills`` are spread over a make, a conversion, an export, a download and a training run,
in forks of a process that has all loaded; ``--real`` of them besides on the engine's own process, and half as many on
the stand-alone WebUI.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from attacks import disks, kills, shelf  # noqa: E402
from i2l_ext.commands.main import main as i2l  # noqa: E402
from results import record_trust, table  # noqa: E402

Row = tuple[str, str, int, str, list[str]]
"""Part, what was done, how many times, what came of it, what was wrong."""


def killed(args: argparse.Namespace, folder: Path) -> list[Row]:
    """At random moments, and before every step on the disk."""
    share, rows = args.kills // 10, []
    deeds = kills.deeds()
    for deed in deeds:
        toll = kills.kill(deed, share * (3 if deed.name == "make" else 1), args.seed, folder / deed.name)
        rows.append(_toll(f"kill -9, {deed.name}", toll))
    with kills.downloading() as deed:
        rows.append(_toll("kill -9, download", kills.kill(deed, share * 2, args.seed, folder / deed.name)))
    rows.append(_toll("kill -9, training", kills.kill(kills.training(), share * 2, args.seed, folder / "training")))
    for deed in deeds:
        rows.append(_toll(f"killed before each step on the disk, {deed.name}", kills.steps(deed, folder / deed.name)))
    return rows


def real(args: argparse.Namespace, folder: Path) -> list[Row]:
    """The processes as they are."""
    return [
        _toll("kill -9 of the engine's own process, make", kills.engines(args.real, args.seed, folder / "engine")),
        _toll(
            "kill -9 of the stand-alone WebUI, make", kills.webuis(max(args.real // 2, 1), args.seed, folder / "webui")
        ),
    ]


def _toll(title: str, toll: kills.Toll) -> Row:
    came = f"{toll.met} met it alive, {toll.writing} with files on their way"
    return "kills", title, toll.tried, came, toll.harm


def disk(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Full at any page and at any byte, failing, read-only, reading short."""
    rows: list[Row] = []
    for deed in kills.deeds():
        here = folder / deed.name
        mounted = {
            "a disk in memory that fills at each of its pages": partial(disks.filling, deed, 20, here / "full"),
            "a read-only disk": partial(disks.read_only, deed, here / "ro"),
        }
        for title, work in mounted.items():
            try:
                rows.append(_trouble(f"{title}, {deed.name}", work()))
            except PermissionError:
                print(f"{title}: skipped, as mounting is not allowed here")
        faults = (
            ("no space left", errno.ENOSPC, True),
            ("EIO writing", errno.EIO, True),
            ("EIO reading", errno.EIO, False),
        )
        for title, code, writes in faults:
            trouble = disks.failing(deed, 30, args.seed, here / title, code, writes=writes)
            rows.append(_trouble(f"{title} at a random byte, {deed.name}", trouble))
        rows.append(_trouble(f"short reads, {deed.name}", disks.short(deed, here / "short")))
    return rows


def clock(args: argparse.Namespace, folder: Path) -> list[Row]:
    """That jumps while something is done."""
    return [
        _trouble(f"a clock that jumps, {deed.name}", disks.jumps(deed, 10, args.seed, folder / deed.name))
        for deed in kills.deeds()
    ]


def others(args: argparse.Namespace, folder: Path) -> list[Row]:
    """At the same name, and at the file that is read."""

    def convert(here: Path, which: int) -> int:
        source = here / "Lora" / ("old" if which else "styles/other")
        return i2l(["convert", f"{source}.safetensors", "--to", "kohya", "-o", str(here / "Lora" / "new.safetensors")])

    def over(here: Path, which: int) -> int:
        return kills._make(here, "--overwrite", "--strength", "0.5" if which else "1")

    pairs = {
        "two make the same name": disks.together(
            lambda here, which: kills._make(here), kills._lay_make, 20, folder / "a", 2
        ),
        "two overwrite the same name": disks.together(over, kills._lay_make, 20, folder / "b", 2, kills.is_style),
        "two convert to the same file": disks.together(convert, shelf.lay, 40, folder / "c", 1),
        "two export to the same folder": disks.together(
            lambda here, which: i2l(
                [
                    "export",
                    str(here / "big.safetensors"),
                    "--for",
                    "diffusers",
                    "--rank",
                    "2",
                    "-o",
                    str(here / "training"),
                ]
            ),
            kills._lay_export,
            20,
            folder / "d",
            1,
        ),
        "a file that changes while it is converted": disks.spoiled(60, args.seed, folder / "e"),
    }
    return [_trouble(title, trouble) for title, trouble in pairs.items()]


def _trouble(title: str, trouble: disks.Trouble) -> Row:
    return "others", title, trouble.tried, f"{trouble.done} done, the others refused in one line", trouble.harm


PARTS: dict[str, Callable[[argparse.Namespace, Path], list[Row]]] = {
    "kills": killed,
    "real": real,
    "disk": disk,
    "clock": clock,
    "others": others,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--real", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--record", action="store_true", help="write the table into benchmarks/TRUST.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="i2l-faults-", dir=memory if memory.is_dir() else None))
    for name in ("I2L_STATE", "I2L_CACHE", "I2L_MODELS", "TMPDIR"):
        (folder / name).mkdir()
        os.environ[name] = str(folder / name)
    rows: list[Row] = []
    try:
        for part, work in PARTS.items():
            if args.only in (None, part):
                (folder / part).mkdir()
                start = time.monotonic()
                rows += work(args, folder / part)
                print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
                for row in rows:
                    print("  ", *row[1:4], len(row[4]), *row[4][:5], sep=" | ", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.record:
        record_trust("Faults", told(rows), script=__file__)
    return int(any(row[4] for row in rows))


def told(rows: list[Row]) -> str:
    """The table, and what it means."""
    kept = sum(row[2] for row in rows if row[0] == "kills")
    wrong = sum(len(row[4]) for row in rows)
    return (
        f"{sum(row[2] for row in rows):,} faults, {kept:,} of them kills; wrong afterwards: {wrong}. After each, every "
        "file of the folder is hashed: it is the old one, or a complete new one that can be read and is finite; no "
        "other file was touched; the same is done again in the same folder, without cleaning, to its end, and then "
        "nothing is left on its way.\n\n"
        + table(("what", "times", "what came of it", "wrong"), [(row[1], row[2], row[3], len(row[4])) for row in rows])
    )


if __name__ == "__main__":
    sys.exit(main())
