"""The commands on LoRA files: inspect, check, convert, rank, merge, export.

Nothing heavy is imported before a command runs: `i2l inspect --header` is over within a tenth of torch's import.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters.dialects import DEFAULT, DIALECTS
from i2l_ext.converters.errors import UserError, one_line, printable
from i2l_ext.converters.trainers import TRAINERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from i2l_ext.converters import Lora
    from i2l_ext.converters.rank import Resizer

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
SHARES = (0.9, 0.95, 0.99, 0.999)


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the commands to the parser of `i2l`."""
    parser = _command(subparsers, "inspect", inspect, "what a LoRA file is: model, dialect, ranks, values, maker")
    parser.add_argument("file", type=Path)
    parser.add_argument("--header", action="store_true", help="do not read the values")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the size of the update and its spectrum")
    parser.add_argument("--overwrite", action="store_true", help="replace the picture if it exists")

    parser = _command(subparsers, "check", check, "who loads a LoRA file, who does not, and what mends it")
    parser.add_argument("file", type=Path)

    parser = _command(subparsers, "convert", convert, "write a LoRA in another dialect")
    parser.add_argument("file", type=Path)
    parser.add_argument("--to", "--format", choices=DIALECTS, default=DEFAULT, help=f"dialect, {DEFAULT} unless given")
    _output(parser)
    _selection(parser)

    parser = _command(subparsers, "rank", rank, "change the rank: the nearest LoRA of a lower one, or room to learn")
    parser.add_argument("file", type=Path)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="K", help="rank of every module")
    size.add_argument("--energy", type=float, metavar="SHARE", help="smallest rank that keeps this share, such as 0.99")
    parser.add_argument(
        "--per-module", action="store_true", help="each module its own rank, for the same size or share"
    )
    parser.add_argument("--exact", action="store_true", help="compute in float64")
    parser.add_argument("--seed", type=int, default=0, help="seed of fresh rows where the rank grows")
    _dialect(parser)
    _output(parser, "fp32")

    parser = _command(subparsers, "merge", merge, "one LoRA from several, each with a weight")
    parser.add_argument("parts", nargs="+", metavar="FILE[:WEIGHT]", help="such as a.safetensors:0.7 b.safetensors:0.3")
    parser.add_argument("--rank", type=int, metavar="K", help="bring the result to this rank; else the ranks add up")
    _dialect(parser)
    _output(parser, "as in the files where the weights lose no digit, else fp32")
    _selection(parser)

    parser = _command(subparsers, "export", export, "a head start for a training run: init file, command, self-check")
    parser.add_argument("file", type=Path)
    parser.add_argument("--for", dest="trainer", choices=TRAINERS, required=True, help="the trainer")
    parser.add_argument("--rank", type=int, metavar="K", help="rank to train at; that of the file unless given")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="folder to write; FILE_TRAINER unless given"
    )
    parser.add_argument("--fill", action="store_true", help="write fresh modules for what the trainer trains besides")
    parser.add_argument("--exact", action="store_true", help="compute in float64")
    parser.add_argument("--seed", type=int, default=0, help="seed of fresh rows")
    parser.add_argument("--overwrite", action="store_true", help="replace files of these names")
    parser.set_defaults(dtype=None)


def _command(subparsers: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")
    parser.set_defaults(run=run)
    return parser


def _dialect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", "--format", choices=DIALECTS, help="dialect; that of the (first) file unless given")


def _output(parser: argparse.ArgumentParser, dtype: str = "as in the file") -> None:
    parser.add_argument("-o", "--output", type=Path, help="file to write; beside the first one unless given")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--dtype", choices=DTYPES, help=f"dtype of the factors; {dtype} unless given")


def _selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", metavar="LIST", help="keep or scale blocks: 0-19 or 0-19:0.5,late:1.2")
    parser.add_argument("--kinds", metavar="LIST", help="keep or scale kinds of layers: attn or txt:0,mlp:0.5")


def inspect(args: argparse.Namespace) -> int:
    from i2l_ext.converters import inspection

    found = inspection.inspect(args.file, values=not args.header)
    told, report = found.json(), inspection.lines(found)
    if args.plot:
        from i2l_ext.converters import Lora, plot, rank

        lora = Lora.read(args.file)
        values = rank.spectra(lora)
        plot.plot(lora, values, args.plot, overwrite=args.overwrite)
        told["plot"] = str(args.plot)
        energies = {f"{share:g}": rank.rank_for([*values.values()], share) for share in SHARES}
        told["rank_for_energy"] = energies
        shares = ", ".join(f"{share} at {rank_}" for share, rank_ in energies.items())
        report += ["", f"  energy kept at rank: {shares}", f"  picture: {args.plot}"]
    _tell(args, told, report)
    return 0


def check(args: argparse.Namespace) -> int:
    from i2l_ext.converters import consumers

    reading, verdicts = consumers.check(args.file)
    report = [
        f"{args.file.name}: {reading.arch.title}, {reading.dialect}",
        *filter(None, [reading.arch.caution]),
        *consumers.lines(verdicts, len(reading.slots)),
    ]
    found = {"caution": reading.arch.caution, "consumers": [verdict.json() for verdict in verdicts]}
    _tell(args, {"file": str(args.file), **found}, report)
    return 0


def convert(args: argparse.Namespace) -> int:
    from i2l_ext.converters.select import select

    lora = select(_read(args.file, args), args.blocks, args.kinds)
    output = args.output or args.file.with_name(f"{args.file.stem}_{args.to}.safetensors")
    return _write(args, lora, output, args.to)


def rank(args: argparse.Namespace) -> int:
    from i2l_ext.converters import rank as ranks

    lora = _read(args.file, args)
    if args.energy is not None and not 0 < args.energy <= 1:
        raise UserError(f"--energy {args.energy:g} cannot be had: say a share above 0 and up to 1, such as 0.99.")
    wanted: int | dict[str, int] = args.rank or 0
    if args.energy is not None or args.per_module:
        ranks.resize(lora, args.rank or 1)  # refuses a rank out of range before the work
        values = ranks.spectra(lora, exact=args.exact)
        if args.energy is None:
            wanted = ranks.ranks_within(lora.arch, values, args.rank)
        else:
            wanted = (
                ranks.ranks_for(values, args.energy)
                if args.per_module
                else ranks.rank_for([*values.values()], args.energy)
            )
    resized = ranks.resize(lora, wanted, exact=args.exact, seed=args.seed)
    output = args.output or args.file.with_name(f"{args.file.stem}_r{resized.rank}.safetensors")
    grows = any(spec.rank > lora.specs[path].rank for path, spec in resized.specs.items())
    fields = {"rank_from": str(lora.rank)} | ({"rank_seed": str(args.seed)} if grows else {})
    return _write(args, resized, output, args.to or _dialect_of(lora), fields, ranks.resizer(resized))


def merge(args: argparse.Namespace) -> int:
    from i2l_ext.converters import concatenate
    from i2l_ext.converters import rank as ranks
    from i2l_ext.converters.metadata import shared
    from i2l_ext.converters.select import select, weighted

    named = [_weight(part) for part in args.parts]
    loras = [_read(path, args) for path, _ in named]
    weights = [weight for _, weight in named]
    parts = [weighted(lora, dict.fromkeys(lora, weight)) for lora, weight in zip(loras, weights, strict=True)]
    merged = select(concatenate(parts, [1.0] * len(parts)), args.blocks, args.kinds)
    merged = replace(merged, metadata=shared([lora.metadata for lora in loras]))
    resizer = None
    if args.rank is not None:
        merged = ranks.resize(merged, args.rank)
        resizer = ranks.resizer(merged)
    recipe = json.dumps([{"file": path.name, "weight": weight} for path, weight in named])
    first = named[0][0]
    output = args.output or first.with_name(f"{first.stem}_merged.safetensors")
    return _write(args, merged, output, args.to or _dialect_of(loras[0]), {"merged": recipe}, resizer)


def export(args: argparse.Namespace) -> int:
    from i2l_ext.converters.export import export as write
    from i2l_ext.converters.export import readme

    lora = _read(args.file, args)
    told = write(
        lora,
        args.trainer,
        args.rank or lora.rank,
        args.output or args.file.with_name(f"{args.file.stem}_{args.trainer}"),
        stem=args.file.stem,
        fill=args.fill,
        exact=args.exact,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    text = readme(TRAINERS[args.trainer], told).splitlines()[2:]
    report = [*text[:1], ""] if told.caution else []
    report += [f"{told.folder}: {told.run}, {Path(told.init).name}, README.md", *text[len(report) :]]
    _tell(args, told.json(), report)
    return 0


def _weight(part: str) -> tuple[Path, float]:
    """FILE:WEIGHT; a Windows drive's colon is none of a weight's."""
    name, colon, number = part.rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        return Path(part), 1.0
    if not math.isfinite(weight):
        raise UserError(f"{part}: {number} is not a weight.")
    return Path(name if colon else part), weight


def _dialect_of(lora: Lora) -> str:
    """The dialect that a file is in, as far as it is one that is written."""
    spoken = lora.read_from.reading.dialect
    return spoken if spoken in DIALECTS else DEFAULT


def _read(path: Path, args: argparse.Namespace) -> Lora:
    """A LoRA for writing it otherwise. What will not be carried over is named on stderr."""
    from i2l_ext.converters import Lora

    lora = Lora.read(path)
    source = lora.read_from
    tensors = source.file.header.tensors
    if args.dtype is None and any(entry.dtype.startswith("F8") for entry in tensors.values()):
        raise UserError(f"{path.name}: its factors are fp8. Say --dtype fp32 (or bf16) to widen them.")
    for what, keys in (("text-encoder", source.reading.text_encoder), ("foreign", source.reading.foreign)):
        if keys:
            names = ", ".join(keys[:2]) + (", …" if len(keys) > 2 else "")
            print(one_line(f"{path.name}: {len(keys)} {what} keys are not carried over: {names}"), file=sys.stderr)
    return lora


def _write(
    args: argparse.Namespace,
    lora: Lora,
    output: Path,
    dialect: str,
    fields: Mapping[str, str] | None = None,
    resizer: Resizer | None = None,
) -> int:
    from i2l_ext.converters.metadata import rewritten

    if args.dtype:
        lora = lora.cast(DTYPES[args.dtype])
    lora.save(output, dialect, metadata=rewritten(lora, dialect, output.stem, **fields or {}), overwrite=args.overwrite)
    dtypes = sorted({spec.dtype for spec in lora.specs.values()})
    told = {
        "file": str(output),
        "arch": lora.arch.id,
        "dialect": dialect,
        "rank": lora.rank,
        "modules": len(lora),
        "dtype": dtypes[0] if len(dtypes) == 1 else "mixed",
        "bytes": (size := output.stat().st_size),
    }
    rank = f"rank {lora.rank}" if len({spec.rank for spec in lora.specs.values()}) == 1 else f"ranks to {lora.rank}"
    line = f"{output}: {lora.arch.title}, {len(lora)} modules, {rank}, {dialect}, {told['dtype']}, {size / 1e6:.1f} MB"
    lines = [line]
    if resizer:
        from i2l_ext.converters.rank import kept

        shares = kept(lora.arch, resizer.seen, resizer.ranks)
        told["kept"] = shares
        lines += [f"  energy kept {share:8.4%}  {kind}" for kind, share in shares.items()]
    _tell(args, told, lines)
    return 0


def _tell(args: argparse.Namespace, data: dict[str, object], lines: list[str]) -> None:
    # a file's own words are shown, but cannot move the cursor of a terminal
    print(json.dumps(data, ensure_ascii=False) if args.json else "\n".join(map(printable, lines)))
