"""``i2l models``: which models there are, and what of them is here."""

from __future__ import annotations

import argparse
import json
import sys


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("models", help="list the models; download and check their weights")
    parser.add_argument("--json", action="store_true", help="print a list of objects, with structure hashes")
    parser.set_defaults(run=show)


def show(args: argparse.Namespace) -> int:
    from i2l_ext.checkpoints.store import gigabytes, listing

    rows = listing(structures=args.json)
    if args.json:
        print(json.dumps([row.as_json() for row in rows], indent=2))
        return 0
    for row in rows:
        state = "ready" if row.ready else f"download {gigabytes(row.download_bytes)}"
        print(f"{row.name:28} {row.line} [{state}]")
        for part in row.parts:
            print(f"    {part.id:24} {gigabytes(part.bytes):>9}  {part.path or 'not here'}")
            if part.problem:
                print(f"{part.id}: {part.problem}", file=sys.stderr)
    return 0
