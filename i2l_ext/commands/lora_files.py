"""The commands on LoRA files: inspect, check, convert, rank, merge, export, library, discard.

Nothing heavy is imported before a command runs: `i2l inspect --header` is over within a tenth of torch's import.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from i2l_ext import requests
from i2l_ext.commands.arguments import add_arguments, add_command, request_of
from i2l_ext.converters.errors import printable
from i2l_ext.operations.bars import Bars, bars
from i2l_ext.requests import Request

if TYPE_CHECKING:
    from i2l_ext.operations.library import DiscardResult, LibraryResult
    from i2l_ext.operations.lora_files import ExportResult, WriteResult
    from i2l_ext.operations.lora_folders import FileOutcome
    from i2l_ext.operations.lora_reports import CheckResult, InspectResult
    from i2l_ext.operations.training_run import RunResult


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the commands."""
    for name, (request, text, lines) in COMMANDS.items():
        parser = add_command(subparsers, name, _runner(request, lines), text)
        add_arguments(parser, request, one_of=("rank", "effect_kept") if name == "rank" else ())


def _runner(request: type[Request], lines: Callable[[Any], list[str]]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        from i2l_ext.operations import Context, perform
        from i2l_ext.operations.lora_folders import for_each_file, is_for_folder

        asked = request_of(args, request)
        with bars() as reporter:
            context = Context(reporter=reporter)
            if is_for_folder(asked):
                return _print_outcomes(_between_bars(for_each_file(asked, context), reporter), args.json, lines)
            result = perform(asked, context)
        _print(result, args.json, lines)
        return 0

    return run


def _print(result: Any, as_json: bool, lines: Callable[[Any], list[str]]) -> None:
    # a file's own words are shown, but cannot move the cursor of a terminal
    text = json.dumps(result.json(), ensure_ascii=False) if as_json else "\n".join(map(printable, lines(result)))
    print(text, flush=True)


def _between_bars(outcomes: Iterable[FileOutcome], reporter: Bars) -> Iterator[FileOutcome]:
    for outcome in outcomes:
        reporter.close()
        yield outcome


def _print_outcomes(outcomes: Iterable[FileOutcome], as_json: bool, lines: Callable[[Any], list[str]]) -> int:
    """Print what comes of each file of a folder when it comes, and a summary. 1 where one of them failed."""
    done, failed = [], 0
    for outcome in outcomes:
        if outcome.error is not None:
            failed += 1
            print(f"i2l: {printable(outcome.reason)}", file=sys.stderr)
        else:
            done.append(outcome.result)
        if as_json:
            print(json.dumps(outcome.json(), ensure_ascii=False), flush=True)
        elif outcome.result is not None:
            _print(outcome.result, False, IN_FOLDER.get(lines, lines))
    if not as_json:
        print(f"{len(done)} of {len(done) + failed} LoRAs done" + (f", {failed} failed" if failed else ""))
        for line in _whole_counts(done):
            print(line)
    return 1 if failed else 0


def check_line(result: CheckResult) -> list[str]:
    """Who loads a LoRA file, in one line: its programs by how they load it, or what must be known before that."""
    if result.arch.caution:
        return [f"{result.file}: {result.arch.title}, {result.key_format}; {result.arch.caution}"]
    by_status: dict[str, list[str]] = {}
    for verdict in result.verdicts:
        by_status.setdefault(verdict.status, []).append(verdict.consumer.title)
    told = "; ".join(f"{status}: {', '.join(titles)}" for status, titles in by_status.items())
    return [f"{result.file}: {result.arch.title}, {result.key_format}, {result.modules} modules; {told}"]


def _whole_counts(results: Iterable[Any]) -> list[str]:
    """How many of several checked files each program loads whole; those with a caution are no program's."""
    checked = [result for result in results if hasattr(result, "verdicts") and not result.arch.caution]
    verdicts = [verdict for result in checked for verdict in result.verdicts if verdict.status != "untried"]
    counts = Counter(verdict.consumer.title for verdict in verdicts if verdict.status == "all")
    titles = dict.fromkeys(verdict.consumer.title for verdict in verdicts)
    return [f"  {title:<28}loads {counts[title]} of them whole" for title in titles]


def inspection_lines(result: InspectResult) -> list[str]:
    """What a LoRA file is, for a person."""
    from i2l_ext.converters import inspection

    report = inspection.report_lines(result.found)
    if result.unplotted:
        return [*report, "", f"  not drawn: {result.unplotted}"]
    if result.plot is None:
        return report
    shares = ", ".join(f"{share} at {rank}" for share, rank in (result.rank_for_effect or {}).items())
    return [*report, "", f"  effect kept at rank: {shares}", f"  picture: {result.plot}"]


def check_lines(result: CheckResult) -> list[str]:
    """Who loads a LoRA file, for a person."""
    from i2l_ext.converters import bases
    from i2l_ext.operations.lora_reports import repair_of

    fit = bases.fit_lines(result.fit, result.base.name, result.modules) if result.fit and result.base else []
    if result.arch.caution:  # no program has a model of these sizes, whatever names it knows
        return [*check_line(result), *fit]
    report = [
        f"{result.file.name}: {result.arch.title}, {result.key_format}",
        *fit,
        f"  {'program':<28}{'loads':<15}{'modules':>9}  why, and what repairs it",
    ]
    for verdict in result.verdicts:
        count = f"{verdict.loads}/{result.modules}" if verdict.status not in ("no model", "untried") else "-"
        report.append(f"  {verdict.consumer.title:<28}{verdict.status:<15}{count:>9}  {verdict.detail}".rstrip())
        if repair := repair_of(result.file, verdict):
            report.append(f"  {'':<52}  -> {repair.command_line()}")
    known: dict[str, list[str]] = {}
    for consumer in (verdict.consumer for verdict in result.verdicts):
        known.setdefault(consumer.source, []).append(f"{consumer.title} {consumer.version}".rstrip())
    return [*report, *(f"  {source}: {', '.join(titles)}" for source, titles in known.items())]


def write_lines(result: WriteResult) -> list[str]:
    """What was written, for a person."""
    rank = f"rank {result.rank}" if result.uniform else f"ranks to {result.rank}"
    line = f"{result.file}: {result.arch.title}, {result.modules} modules, {rank}, {result.key_format}, {result.dtype}"
    kept = [f"  effect kept {share:8.4%}  {kind}" for kind, share in (result.kept or {}).items()]
    return [f"{line}, {result.bytes / 1e6:.1f} MB", *kept]


def export_lines(result: ExportResult) -> list[str]:
    """The start folder, and what its read-me says."""
    from i2l_ext.converters.start_folder import readme
    from i2l_ext.converters.trainers import TRAINERS

    written = result.written
    text = readme(TRAINERS[written.trainer], written).splitlines()[2:]
    report = [*text[:1], ""] if written.caution else []
    return [
        *report,
        f"{written.folder}: {', '.join(written.names)}",
        *([f"To fill in: {written.to_fill_in}"] if written.blanks and not written.caution else []),
        *(line.removeprefix("## ") for line in text[len(report) :]),
    ]


def run_lines(result: RunResult) -> list[str]:
    """The LoRA that a trainer made."""
    loss = f", loss {result.losses[0][1]:g} to {result.losses[-1][1]:g}" if result.losses else ""
    return [
        f"{result.file}: rank {result.rank}, {result.modules} modules, {result.seconds:.0f} s{loss}",
        f"  the trainer's own file: {result.source}",
    ]


def library_lines(result: LibraryResult) -> list[str]:
    """The LoRAs of folders, a line each."""
    from i2l_ext.converters.architectures import ARCHITECTURES

    lines = []
    for row in result.rows:
        if "error" in row:
            lines.append(f"{row['file']}: {row['error']}")
            continue
        loading = [name for name, status in row["loads"].items() if status == "all"]
        made = f", made with {row['made']['model']}" if row["made"] else ""
        who = f"loads in {', '.join(loading)}" if loading else "no program here loads all of it"
        lines.append(
            f"{row['file']}: {row['model']}, {row['key_format']}, rank {row['rank']}, {row['bytes'] / 1e6:.1f} MB{made}"
            f"; {ARCHITECTURES[row['arch']].caution or who}"
        )
    others = sum("error" in row for row in result.rows)
    strange = f", {others} other file{'s' * (others > 1)}" if others else ""
    found = f"{len(result.rows) - others} LoRAs{strange}"
    return [*lines, f"{found}; {result.read} headers read, the others remembered"]


def discard_lines(result: DiscardResult) -> list[str]:
    """What was moved, and where it is."""
    return [f"{len(result.files)} LoRAs are in {', '.join(map(str, result.folders))}"]


COMMANDS: dict[str, tuple[type[Request], str, Callable[[Any], list[str]]]] = {
    "inspect": (
        requests.InspectRequest, "what a LoRA file is: model, key format, ranks, values, maker", inspection_lines
    ),
    "check": (requests.CheckRequest, "who loads a LoRA file, who does not, and what repairs it", check_lines),
    "convert": (requests.ConvertRequest, "write a LoRA in another key format", write_lines),
    "rank": (
        requests.RankRequest, "change the rank: the nearest LoRA of a lower one, or room to learn", write_lines
    ),
    "merge": (requests.MergeRequest, "one LoRA from several, each with a weight", write_lines),
    "export": (
        requests.ExportRequest, "a start folder for a training run: start file, command, read-me", export_lines
    ),
    "run": (requests.RunRequest, "run a trainer from a start folder, and take the LoRA that it makes", run_lines),
    "library": (
        requests.LibraryRequest, "the LoRAs of folders: model, rank, key format, who loads each", library_lines
    ),
    "discard": (requests.DiscardRequest, "move LoRAs with their previews into the trash", discard_lines),
}  # fmt: skip
"""Command -> its request, its help, and its result for a person."""

IN_FOLDER: dict[Callable[[Any], list[str]], Callable[[Any], list[str]]] = {check_lines: check_line}
"""What a person is shown of one file, where it is one of many."""
