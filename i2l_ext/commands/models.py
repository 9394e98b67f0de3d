"""``i2l models``: which models there are, and their files; ``i2l cache``: the encoder cache."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from i2l_ext.commands.arguments import add_arguments, add_engine_options, engine_options_of, request_of
from i2l_ext.converters.errors import UserError
from i2l_ext.operations.bars import bars
from i2l_ext.requests import (
    CacheRequest,
    DownloadRequest,
    ModelsRequest,
    PackRequest,
    SetupPlanRequest,
    SetupRequest,
    TrustRequest,
    VerifyRequest,
)

if TYPE_CHECKING:
    from i2l_ext.operations.models import DownloadPlan


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the commands."""
    models = subparsers.add_parser("models", help="list the models; download and check their files")
    models.add_argument("--json", action="store_true", help="print a list of objects, with structure hashes")
    models.set_defaults(run=run_models)
    actions = models.add_subparsers(metavar="ACTION")

    fetch = actions.add_parser("download", help="fetch the files of a model")
    add_arguments(fetch, DownloadRequest)
    fetch.add_argument("--offline", action="store_true", help="only say what is missing")
    fetch.set_defaults(run=run_download)

    pack = actions.add_parser(
        "pack", help="pack the files of a model that are here to little more than half their size"
    )
    add_arguments(pack, PackRequest)
    add_engine_options(pack)
    pack.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    pack.set_defaults(run=run_pack)

    trust = actions.add_parser("trust", help="see the code that a v2 model brings, and agree to run it")
    add_arguments(trust, TrustRequest)
    trust.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    trust.set_defaults(run=run_trust)

    install = actions.add_parser(
        "diffsynth", help="set up DiffSynth-Studio, through which the v2 models run, in a folder of its own"
    )
    add_arguments(install, SetupRequest)
    install.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    install.set_defaults(run=run_setup)

    check = actions.add_parser("verify", help="check the files that are here, byte for byte where that is possible")
    add_arguments(check, VerifyRequest)
    check.set_defaults(run=run_verify)

    cache = subparsers.add_parser("cache", help="show or clear the encoder cache")
    steps = cache.add_subparsers(metavar="ACTION", required=True)
    for name, what, clear in (("show", "how much is cached", False), ("clear", "delete what is cached", True)):
        step = steps.add_parser(name, help=what)
        step.add_argument("--json", action="store_true", help="print one JSON object")
        step.set_defaults(run=run_cache, clear=clear)


def run_models(args: argparse.Namespace) -> int:
    """Print every model, and which of its files are here."""
    from i2l_ext.models.store import gigabytes
    from i2l_ext.operations import Context, perform

    found = perform(ModelsRequest(structures=args.json), Context())
    if args.json:
        print(json.dumps(found.json(), indent=2))
        return 0
    for row in found.rows:
        state = "ready" if row.ready else f"{gigabytes(row.download_bytes)} to download"
        print(f"{row.name}: {row.line} ({state})")
        for part in row.parts:
            packed = f"packed ({part.packed}): " if part.packed else ""
            place = f"{packed}{part.path}" if part.path else part.problem or "not here"
            print(f"    {part.id:24} {gigabytes(part.bytes):>9}  {place}")
    print(f"Downloads go to {found.rows[0].download_folder}")
    return 0


def run_download(args: argparse.Namespace) -> int:
    """Fetch what a model lacks, once the user has seen the licences and agreed."""
    from i2l_ext.models.store import gigabytes
    from i2l_ext.operations import Context, perform
    from i2l_ext.operations.models import plan_download

    request = request_of(args, DownloadRequest)
    plan = plan_download(request)
    name = plan.model.name
    if not plan.missing:
        print(f"{name}: all its weights are here.", file=sys.stderr)
        return 0
    if args.offline or _is_offline():
        missing = ", ".join(place for part in plan.missing for place in part.places)
        advice = f"Fetch them on another machine, and put them by these names into {plan.folders.own.absolute()}."
        raise UserError(f"{name}: offline; {gigabytes(plan.bytes)} are missing: {missing}. {advice}")
    title = f"{name}: {gigabytes(plan.bytes)} to download from {request.source} into {plan.folders.own}"
    if request.packed:
        title += f", where {gigabytes(plan.packed_bytes)} of it are kept"
    _ask_consent(title, plan, request.agreed)
    try:
        with bars() as reporter:
            fetched = perform(replace(request, agreed=True), Context(reporter=reporter))
    except KeyboardInterrupt:
        print("i2l: stopped; the next download goes on from here.", file=sys.stderr)
        return 130
    for path in fetched.files:
        print(path)
    if request.folder:
        print(f"To have downloads go there always, set I2L_MODELS={plan.folders.own}", file=sys.stderr)
    return 0


def run_pack(args: argparse.Namespace) -> int:
    """Pack what is here, and say what that has given and, with pictures, what it moves."""
    from i2l_ext.models.store import gigabytes
    from i2l_ext.operations import Context, perform

    try:
        with bars() as reporter:
            found = perform(request_of(args, PackRequest), Context(engine_options_of(args), reporter))
    except KeyboardInterrupt:
        print("i2l: stopped; what was packed is kept for the next time.", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(found.json(), indent=2))
        return 0
    for part in found.parts:
        print(f"{part.id}: {gigabytes(part.bytes)} ({found.form})", *part.files, sep="\n    ")
    size = gigabytes(sum(part.bytes for part in found.parts))
    print(f"{found.model}: the packed files are used from now on ({size}).")
    spare = [path for part in found.parts for path in part.unpacked]
    if spare:
        whole = gigabytes(sum(part.unpacked_bytes for part in found.parts))
        print(f"The unpacked files are no longer needed ({whole}). Delete them to have the room:")
        print(*(f"    {path}" for path in spare), sep="\n")
    if found.moved:
        print(f"Against the unpacked files, on {found.moved.pictures} pictures:")
        for id, share in {**found.moved.embeddings, "update": found.moved.update}.items():
            print(f"    {id:24} {100 * share:.2f} %")
    return 0


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _ask_consent(title: str, plan: DownloadPlan, agreed: bool) -> None:
    """Show the licences and ask. Raises UserError where nobody can be asked, or the answer is no."""
    from i2l_ext.models.download import notes

    if not agreed and not (sys.stdin and sys.stdin.isatty()):
        raise UserError(
            f"{title}. There is no terminal to ask in: read the licences ({plan.licences}), then add --yes.", "licences"
        )
    print(title, *notes(plan.missing), sep="\n  ", file=sys.stderr)
    if not agreed:
        print("Do you agree to these licences, and download? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UserError("Nothing was downloaded.", "licences")


def run_trust(args: argparse.Namespace) -> int:
    """Show whose code would run, and ask. Only the digest itself, typed or given by --agree, is an agreement."""
    from i2l_ext.operations import Context, perform

    request = request_of(args, TrustRequest)
    with bars() as reporter:
        found = perform(request, Context(reporter=reporter))
    if args.json:
        print(json.dumps(found.json(), indent=2))
        return 0
    print(f"{found.model}: code of {found.repo}, revision {found.revision}")
    print(f"  read it: {found.source}")
    print(f"  or here: {found.folder}")
    print(f"  licence: {found.licence}")
    for name, sha in found.files.items():
        print(f"  {sha}  {name}")
    print(f"  digest of all: {found.digest}")
    print(f"  {found.cage}")
    if not found.agreed and not request.withdraw and sys.stdin and sys.stdin.isatty():
        print("This code is not ours and was not checked by us. To let it run, type the first eight digits of the "
              "digest: ", end="", file=sys.stderr, flush=True)  # fmt: skip
        if sys.stdin.readline().strip().lower() != found.digest[:8]:
            raise UserError("Nothing was agreed to.", "untrusted")
        found = perform(replace(request, digest=found.digest), Context())
    told = (
        "it may run"
        if found.agreed
        else f"it does not run until you say: i2l models trust {found.model} --agree DIGEST"
    )
    print(f"{found.model}: {told}")
    return 0


def run_setup(args: argparse.Namespace) -> int:
    """Say what would be done, ask, and do it."""
    from i2l_ext.models.store import gigabytes
    from i2l_ext.operations import Context, perform

    request = request_of(args, SetupRequest)
    found = perform(SetupPlanRequest(request.torch), Context())
    if not found.present:
        size, disk = gigabytes(found.download_bytes), gigabytes(found.disk_bytes)
        print(f"DiffSynth-Studio {found.version} into {found.folder}: about {size} to download; {disk} on the disk",
              f"  from PyPI, and torch from {found.origin}", sep="\n", file=sys.stderr)  # fmt: skip
        _ask(request.agreed, "Set it up? [y/N] ", "There is no terminal to ask in: add --yes.", "Nothing was set up.")
        try:
            with bars() as reporter:
                found = perform(replace(request, agreed=True), Context(reporter=reporter))
        except KeyboardInterrupt:
            print("i2l: stopped; what was fetched is kept for the next time.", file=sys.stderr)
            return 130
    print(json.dumps(found.json(), indent=2) if args.json else f"DiffSynth-Studio {found.version}: {found.folder}")
    return 0


def _ask(agreed: bool, question: str, nobody: str, no: str) -> None:
    """Ask unless it was agreed to before. Raises UserError where nobody can be asked, or the answer is no."""
    if agreed:
        return
    if not (sys.stdin and sys.stdin.isatty()):
        raise UserError(nobody)
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError(no)


def run_verify(args: argparse.Namespace) -> int:
    """Check model files and print what was found. Raises UserError where some cannot be used."""
    from i2l_ext.operations import Context, perform

    with bars() as reporter:
        found = perform(request_of(args, VerifyRequest), Context(reporter=reporter))
    for part in found.parts:
        verdict = f"OK: {part.held}: {part.file}" if part.held else part.problem or "not here"
        print(f"{part.id}: {verdict}")
    if found.problems:
        raise UserError(f"{len(found.problems)} of the files above cannot be used.")
    return 0


def run_cache(args: argparse.Namespace) -> int:
    """Print what the encoder cache holds, or held before it was cleared."""
    from i2l_ext.operations import Context, perform

    found = perform(CacheRequest(clear=args.clear), Context())
    if args.json:
        print(json.dumps(found.json()))
    else:
        verb = "deleted" if args.clear else "holds"
        print(f"{found.folder}: {verb} {found.entries} embeddings, {found.bytes / 1e6:.1f} MB.")
    return 0
