"""``i2l models``: which models there are, their weights; ``i2l cache``: what pictures gave the encoders."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from i2l_ext.models.catalogue import Checkpoint


def register(subparsers: argparse._SubParsersAction) -> None:
    models = subparsers.add_parser("models", help="list the models; download and check their weights")
    models.add_argument("--json", action="store_true", help="print a list of objects, with structure hashes")
    models.set_defaults(run=show_models)
    actions = models.add_subparsers(metavar="ACTION")

    fetch = actions.add_parser("download", help="fetch the weights of a model")
    fetch.add_argument("name", metavar="NAME", help="a model, as `i2l models` lists them")
    fetch.add_argument("--from", dest="source", choices=("huggingface", "modelscope"), default="huggingface")
    fetch.add_argument("--to", type=Path, metavar="DIR", help="a folder of your choice (default: as `i2l models` says)")
    fetch.add_argument("--yes", action="store_true", help="agree to the licences without being asked")
    fetch.add_argument("--offline", action="store_true", help="only say what is missing")
    fetch.set_defaults(run=download_model)

    check = actions.add_parser("verify", help="check the weights that are here, byte for byte where that is possible")
    check.add_argument("name", metavar="NAME", nargs="?", help="one model; all without")
    check.set_defaults(run=verify_models)

    cache = subparsers.add_parser("cache", help="show or clear what pictures gave the encoders")
    steps = cache.add_subparsers(metavar="ACTION", required=True)
    for name, what, run in (("show", "how much it is", show_cache), ("clear", "let it all go", clear_cache)):
        step = steps.add_parser(name, help=what)
        step.add_argument("--json", action="store_true", help="print one JSON object")
        step.set_defaults(run=run)


def show_models(args: argparse.Namespace) -> int:
    from i2l_ext.models.store import gigabytes, listing

    rows = listing(structures=args.json)
    if args.json:
        print(json.dumps([row.as_json() for row in rows], indent=2))
        return 0
    for row in rows:
        state = "ready" if row.ready else f"{gigabytes(row.download_bytes)} to download"
        print(f"{row.name}: {row.line} ({state})")
        for part in row.parts:
            print(f"    {part.id:24} {gigabytes(part.bytes):>9}  {part.path or part.problem or 'not here'}")
    print(f"Downloads go to {rows[0].download_folder}")
    return 0


def download_model(args: argparse.Namespace) -> int:
    from i2l_ext.models import catalogue
    from i2l_ext.models.download import Job, download, missing
    from i2l_ext.models.hubs import HUBS
    from i2l_ext.models.store import Folders, gigabytes, remember

    model = catalogue.find(args.name)
    folders = Folders.default()
    if args.to:
        folders = replace(folders, own=args.to.expanduser().absolute(), webui=(folders.own, *folders.webui))
    parts = missing(model, folders)
    if not parts:
        print(f"{model.name}: all its weights are here.", file=sys.stderr)
        return 0
    size = gigabytes(sum(part.nbytes for part in parts))
    if args.offline or _is_offline():
        raise UserError(f"{model.name}: offline; {size} are missing: {', '.join(part.id for part in parts)}.")
    _consent(f"{model.name}: {size} to download from {args.source} into {folders.own}", parts, args.yes)
    remember(folders.own)
    try:
        with _bar() as progress:
            paths = download(parts, HUBS[args.source](), folders.own, Job(progress))
    except KeyboardInterrupt:
        print("i2l: stopped; the next download goes on from here.", file=sys.stderr)
        return 130
    for path in paths:
        print(path)
    if args.to:
        print(f"To have downloads go there always, set I2L_MODELS={folders.own}", file=sys.stderr)
    return 0


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _consent(title: str, parts: Sequence[Checkpoint], agreed: bool) -> None:
    """Show the licences and ask. Raises UserError where nobody can be asked, or the answer is no."""
    from i2l_ext.models.download import notes

    if not agreed and not (sys.stdin and sys.stdin.isatty()):
        raise UserError(f"{title}. Nobody can be asked here: add --yes to agree to the licences ({_licences(parts)}).")
    print(title, *notes(parts), sep="\n  ", file=sys.stderr)
    if not agreed:
        print("Do you agree to these licences, and download? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UserError("Nothing was downloaded.")


def _licences(parts: Sequence[Checkpoint]) -> str:
    return "; ".join(dict.fromkeys(part.licence for part in parts))


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """One bar on stderr for each phase; none where nobody looks."""
    from tqdm import tqdm

    bar: tqdm | None = None
    phase = ""

    def progress(now: str, done: int, total: int) -> None:
        nonlocal bar, phase
        if bar is None or phase != now:
            if bar is not None:
                bar.close()
            phase = now
            bar = tqdm(
                desc=now,
                total=total,
                initial=done,
                unit="B",
                unit_scale=True,
                leave=False,
                file=sys.stderr,
                disable=None,
            )
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def verify_models(args: argparse.Namespace) -> int:
    from i2l_ext.models import catalogue
    from i2l_ext.models.download import Job, verify
    from i2l_ext.models.store import Folders, locate

    models = [catalogue.find(args.name)] if args.name else list(catalogue.MODELS.values())
    folders = Folders.default()
    bad = 0
    for part in {part.id: part for model in models for part in model.parts}.values():
        try:
            paths = locate(part, folders)
            if paths is None:
                print(f"{part.id}: not here")
                continue
            with _bar() as progress:
                held = verify(part, paths, Job(progress))
            print(f"{part.id}: {held} hold: {paths[0]}")
        except UserError as error:
            bad += 1
            print(f"{part.id}: {error}")
    if bad:
        raise UserError(f"{bad} of the files above cannot be used.")
    return 0


def show_cache(args: argparse.Namespace) -> int:
    from i2l_ext.encoders.cache import Cache

    cache = Cache.default()
    _tell_cache(args, "holds", *cache.size(), cache.folder)
    return 0


def clear_cache(args: argparse.Namespace) -> int:
    from i2l_ext.encoders.cache import Cache

    cache = Cache.default()
    _tell_cache(args, "let go", *cache.clear(), cache.folder)
    return 0


def _tell_cache(args: argparse.Namespace, verb: str, entries: int, size: int, folder: Path) -> None:
    if args.json:
        print(json.dumps({"folder": str(folder), "entries": entries, "bytes": size}))
    else:
        print(f"{folder}: {verb} {entries} embeddings, {size / 1e6:.1f} MB.")
