"""``i2l draw`` and ``i2l report``: the miniature's own commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from i2l_ext.converters.errors import UserError


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``draw`` and ``report``."""
    parser = subparsers.add_parser(
        "draw",
        help="draw with the miniature's base model, with LoRAs or without",
        description="Draws a prompt such as 'a star left' with the miniature's base model. LoRAs come from --lora, or "
        "from <lora:NAME:WEIGHT> in the prompt, looked up in the LoRA folder as a WebUI does.",
    )
    parser.add_argument("--prompt", default="a circle", help="default: a circle")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="may be given again")
    parser.add_argument("--lora-dir", type=Path, default=Path("models/Lora"), help="default: models/Lora")
    parser.add_argument("--grid", metavar="W,W,…", help="one picture for each factor on the LoRAs' weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=256, help="side of a picture in pixels (default 256)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--overwrite", action="store_true")
    parser.set_defaults(run=draw)

    parser = subparsers.add_parser(
        "report",
        help="recompute the table of claims from the shipped weights",
        description="Measures every claim on pictures never seen in training, writes the table and its pictures, and "
        "ends with exit code 1 if a bound is broken.",
    )
    parser.add_argument("--quick", action="store_true", help="a smaller sample, and nothing written: for CI")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="one row of the table; repeatable")
    parser.add_argument("--weights", type=Path, help="other weights than the shipped ones, for example runs/mini")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another run, its figures beside the first's")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/claims.md"), help="default: docs/claims.md")
    parser.set_defaults(run=report)


def _needs_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise UserError("The miniature needs the package diffusers: pip install 'image-to-lora[mini]'.") from None


def _weighted(text: str) -> tuple[Path, float]:
    """FILE:WEIGHT or FILE. A colon in the file's own name, as in C:\\, does not count: what follows is no number."""
    name, colon, weight = text.rpartition(":")
    try:
        return (Path(name), float(weight)) if colon and name else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def draw(args: argparse.Namespace) -> int:
    """Raises UserError for an unknown word, a missing LoRA, and one of another model."""
    _needs_diffusers()
    from i2l_ext.converters.atomic import atomic_path
    from i2l_ext.converters.lora import Lora
    from i2l_ext.mini import draw

    prompt, named = draw.split_prompt(args.prompt)
    files = [_weighted(text) for text in args.lora]
    files += [(draw.find_lora(name, args.lora_dir), weight) for name, weight in named]
    loras = [(Lora.read(path), weight) for path, weight in files]
    try:
        factors = [float(part) for part in args.grid.split(",")] if args.grid else [1.0]
    except ValueError:
        raise UserError(f"--grid {args.grid}: write numbers with commas between them, as in 0,0.5,1.") from None
    if not 32 <= args.size <= 4096:
        raise UserError(f"--size {args.size}: choose 32 to 4096 pixels.")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: a seed is 0 or greater.")

    painter = draw.Painter()
    pictures = [
        painter.paint(prompt, args.seed, [(lora, weight * factor) for lora, weight in loras], args.size)
        for factor in factors
    ]
    image = pictures[0] if len(pictures) == 1 else draw.sheet([pictures], args.grid.split(","), args.size)
    if not args.out.parent.is_dir():
        raise UserError(f"The folder {args.out.parent} does not exist.")
    with atomic_path(args.out, overwrite=args.overwrite) as part:
        image.save(part, format="PNG")
    print(args.out)
    return 0


def report(args: argparse.Namespace) -> int:
    """Exit code 1 with the broken rows on stderr where a bound does not hold."""
    _needs_diffusers()
    from i2l_ext.mini import report

    out = None if args.quick or args.only else args.out
    broken = report.run(args.weights, out, quick=args.quick, only=args.only, against=args.against)
    for line in broken:
        print(f"i2l: {line}", file=sys.stderr)
    return 1 if broken else 0
