"""How long ``i2l make`` takes from packed files, beside unpacked ones: at full size, cold, on slow disks and fast ones.

    python benchmarks/packed_speed.py --dir /somewhere/with/room --disks 200 1000 --rounds 3

Both have random weights of the real structure and are written to ``--dir`` once: 21 and 12 GB for Style. A slow disk
is this machine's, read at so many megabytes a second at most (``throttled.py``); a rate that it does not reach itself
changes nothing. Each round makes both, in turns, with the files put out of the page cache before.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path

from bench import out_of_cache, ratio, spread
from i2l_ext.models import catalogue
from i2l_ext.weights.packing import PACK_FORMATS
from real_size import Run, make, read_all, some_pictures, weights
from results import record, table


def measure(args: argparse.Namespace, scratch: Path) -> list[list[object]]:
    """A row for each disk."""
    model = catalogue.find(args.model)
    homes = {"unpacked": args.dir / "unpacked", "packed": args.dir / "packed"}
    files = {
        "unpacked": weights(model, homes["unpacked"]),
        "packed": weights(model, homes["packed"], args.to),
    }
    pictures = some_pictures(scratch, args.images)
    rows = []
    for rate in args.disks:
        runs: dict[str, list[Run]] = {form: [] for form in files}
        for number in range(args.rounds):
            for form in sorted(files, reverse=bool(number % 2)):
                out_of_cache(files[form])
                shutil.rmtree(scratch / "cache", ignore_errors=True)
                runs[form].append(make(args.model, homes[form], pictures, scratch, megabytes=rate))
        seconds = {form: [run.seconds for run in of] for form, of in runs.items()}
        busy = {form: statistics.median(run.busy for run in of) for form, of in runs.items()}
        read = {form: of[0].read for form, of in runs.items()}
        title = f"{rate:g} MB/s" if rate else "this machine's"
        times = (spread(seconds["unpacked"]), spread(seconds["packed"]), ratio(seconds["packed"], seconds["unpacked"]))
        both = (f"{busy['unpacked']:.0f} / {busy['packed']:.0f}", f"{read['unpacked']:.1f} / {read['packed']:.1f}")
        rows.append([title, *times, *both])
        report(args, files, rows)
    return rows


def report(args: argparse.Namespace, files: dict[str, list[Path]], rows: list[list[object]]) -> None:
    """What is known so far."""
    alone = " and ".join(f"{sum(p.stat().st_size for p in of) / 1e9 / read_all(of):.2f}" for of in files.values())
    text = (
        f"{args.model}, {args.images} picture(s), {args.to}, {args.rounds} rounds. In the end this machine's disk gave "
        f"{alone} GB/s. Other work on the machine: a load of {os.getloadavg()[2]:.1f} in the last 15 minutes.\n\n"
    )
    head = ["disk", "unpacked: seconds", "packed: seconds", "packed / unpacked", "processor seconds", "GB read"]
    record("i2l make from packed files, beside unpacked ones", text + table(head, rows), script=__file__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-image-style", choices=catalogue.MODELS)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--to", choices=PACK_FORMATS, default="int9")
    parser.add_argument("--disks", type=float, nargs="+", default=[200, 1000], help="MB a second at most; 0: as it is")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, required=True, help="where the weights lie, or are to be written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, Path(scratch))


if __name__ == "__main__":
    main()
