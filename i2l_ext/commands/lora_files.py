"""The commands on LoRA files: inspect, convert.

Nothing heavy is imported before a command runs: `i2l inspect --header` is over within a tenth of torch's import.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters.dialects import DEFAULT, DIALECTS
from i2l_ext.converters.errors import UserError

if TYPE_CHECKING:
    from i2l_ext.converters import Lora

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the commands to the parser of `i2l`."""
    parser = _command(subparsers, "inspect", inspect, "what a LoRA file is: model, dialect, ranks, values, maker")
    parser.add_argument("file", type=Path)
    parser.add_argument("--header", action="store_true", help="do not read the values")

    parser = _command(subparsers, "convert", convert, "write a LoRA in another dialect")
    parser.add_argument("file", type=Path)
    parser.add_argument("--to", "--format", choices=DIALECTS, default=DEFAULT, help=f"dialect, {DEFAULT} unless given")
    _output(parser)
    _selection(parser)


def _command(subparsers: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")
    parser.set_defaults(run=run)
    return parser


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
    _tell(args, found.json(), inspection.lines(found))
    return 0


def convert(args: argparse.Namespace) -> int:
    from i2l_ext.converters.select import select

    lora = select(_read(args.file, args), args.blocks, args.kinds)
    output = args.output or args.file.with_name(f"{args.file.stem}_{args.to}.safetensors")
    return _write(args, lora, output, args.to)


def _read(path: Path, args: argparse.Namespace) -> Lora:
    """A LoRA for writing it otherwise. What will not be carried over is named on stderr."""
    from i2l_ext.converters import Lora

    lora = Lora.read(path)
    source = lora.source
    tensors = source.file.header.tensors
    if args.dtype is None and any(entry.dtype.startswith("F8") for entry in tensors.values()):
        raise UserError(f"{path.name}: its factors are fp8. Say --dtype fp32 (or bf16) to widen them.")
    for what, keys in (("text-encoder", source.reading.text_encoder), ("foreign", source.reading.foreign)):
        if keys:
            names = ", ".join(keys[:2]) + (", …" if len(keys) > 2 else "")
            print(f"{path.name}: {len(keys)} {what} keys are not carried over: {names}", file=sys.stderr)
    return lora


def _write(args: argparse.Namespace, lora: Lora, output: Path, dialect: str, **fields: str) -> int:
    from i2l_ext.converters.metadata import rewritten

    if args.dtype:
        lora = lora.cast(DTYPES[args.dtype])
    lora.save(output, dialect, metadata=rewritten(lora, dialect, output.stem, **fields), overwrite=args.overwrite)
    dtypes = sorted({spec.dtype for spec in lora.specs.values()})
    told = {
        "file": str(output),
        "arch": lora.arch.id,
        "dialect": dialect,
        "rank": lora.rank,
        "modules": len(lora),
        "dtype": dtypes[0] if len(dtypes) == 1 else "mixed",
        "bytes": output.stat().st_size,
    }
    rank = f"rank {lora.rank}" if len({spec.rank for spec in lora.specs.values()}) == 1 else f"ranks to {lora.rank}"
    size = told["bytes"] / 1e6
    line = f"{output}: {lora.arch.title}, {len(lora)} modules, {rank}, {dialect}, {told['dtype']}, {size:.1f} MB"
    _tell(args, told, [line])
    return 0


def _tell(args: argparse.Namespace, data: dict[str, object], lines: list[str]) -> None:
    print(json.dumps(data, ensure_ascii=False) if args.json else "\n".join(lines))
