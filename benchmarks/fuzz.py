"""Inputs that are wrong, by the hundred thousand: each is to end in success or one clear error, soon and in little
memory, and to leave nothing behind.

    python benchmarks/fuzz.py [--inputs 100000] [--seed 0] [--only TARGET] [--record] [--one INDEX]

The same seed gives the same inputs. A finding names its target and its index; `--only TARGET --one INDEX` repeats it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from attacks import headers, lines, pictures, requests, words  # noqa: E402
from attacks.judge import MEGABYTES, SECONDS, Tally, Target, attack  # noqa: E402
from results import record_trust, table  # noqa: E402

TARGETS = {
    target.name: target
    for target in (
        Target(
            "pictures",
            "every format that Pillow writes, damaged blindly, in chunks, in EXIF, inflated; into `open_image`",
            0.25,
            pictures.start,
        ),
        Target(
            "loras",
            "safetensors whose headers lie, into `i2l inspect`, `check`, `convert`, `rank`, `merge`",
            0.20,
            headers.start_loras,
        ),
        Target(
            "checkpoints",
            "the same and lists of shards, into the store, the structure and the streaming of weights",
            0.12,
            headers.start_checkpoints,
        ),
        Target("names", "names, sub-folders, paths and ids that hypothesis draws", 0.12, words.start),
        Target("events", "JSON lines that an engine might say, into the WebUI's queue", 0.06, lines.start_events),
        Target("orders", "JSON lines that a WebUI might send, into the engine", 0.04, lines.start_requests),
        Target(
            "records",
            "our own small files, damaged: job records, settings, notes, the cache",
            0.06,
            lines.start_records,
        ),
        Target("schema", "schemathesis from our OpenAPI, as it says and against it", 0.05, requests.start_schema),
        Target("bodies", "raw HTTP bodies, types, lengths and paths", 0.10, requests.start_raw),
    )
}


def run(inputs: int, seed: int, names: Sequence[str], folder: Path) -> dict[str, Tally]:
    """Every target's share of the inputs."""
    tallies = {}
    for name in names:
        target = TARGETS[name]
        tallies[name] = attack(target, max(round(inputs * target.share), 1), seed, folder / name)
        print(_row(target, tallies[name]), flush=True)
        for finding in tallies[name].findings[:20]:
            print("   ", finding, flush=True)
    return tallies


def _row(target: Target, tally: Tally) -> list[object]:
    return [
        target.name,
        target.what,
        f"{tally.inputs:,}",
        f"{tally.sound:,}",
        f"{tally.refused:,}",
        f"{tally.seconds:.2f}",
        f"{tally.megabytes:.0f}",
        len(tally.findings),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    parser.add_argument("--one", type=int, metavar="INDEX", help="one input of a target again")
    parser.add_argument("--record", action="store_true", help="write the table into benchmarks/TRUST.md")
    args = parser.parse_args()
    names = [args.only] if args.only else list(TARGETS)
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="i2l-fuzz-", dir=memory if memory.is_dir() else None))
    try:
        if args.one is not None:
            found = attack(TARGETS[names[0]], args.one + 1, args.seed, folder / names[0], first=args.one).findings
            print(found or "no finding")
            return int(bool(found))
        tallies = run(args.inputs, args.seed, names, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    findings = [finding for tally in tallies.values() for finding in tally.findings]
    if args.record:
        record_trust("Fuzzing", told(tallies), script=__file__)
    return int(bool(findings))


def told(tallies: dict[str, Tally]) -> str:
    """The table, and what it means."""
    head = ("target", "what", "inputs", "accepted", "refused in one line", "slowest, s", "most memory, MB", "findings")
    rows = [_row(TARGETS[name], tally) for name, tally in tallies.items()]
    total = sum(tally.inputs for tally in tallies.values())
    found = sum(len(tally.findings) for tally in tallies.values())
    return (
        f"{total:,} inputs, {found} findings. A finding is an input that ends in anything but success or one printable "
        f"line of at most 1,000 characters, that takes more than {SECONDS:.0f} s of processor time or {MEGABYTES} MB "
        "more memory than the process had, that hangs, kills its process, changes what it was given or leaves a file "
        f"that it should not.\n\n{table(head, rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
