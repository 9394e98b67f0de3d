"""``i2l draw`` and ``i2l report``: images from mini, and its table of claims."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from i2l_ext.converters.errors import UserError
from i2l_ext.library import names

BRANCHES = ("positive", "both", "grey")
CFG = 4.0
"""The scale of guidance that the authors advise."""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add ``draw`` and ``report``."""
    parser = subparsers.add_parser(
        "draw",
        help="generate an image with mini's base model, with LoRAs or without",
        description="Generates an image from a prompt such as 'a star left' with the base model of mini, the built-in "
        "test model. LoRAs come from --lora, or from <lora:NAME:WEIGHT> in the prompt, as in a WebUI.",
    )
    parser.add_argument("--prompt", default="a circle", help="default: a circle")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="a LoRA and its LoRA weight; repeatable"
    )
    parser.add_argument(
        "--lora-dir", type=Path, default=Path("models/Lora"), help="where <lora:NAME> looks (default: models/Lora)"
    )
    parser.add_argument(
        "--branch",
        choices=BRANCHES,
        help="where the LoRAs act: on the positive branch of guidance, on both, or with NAME-grey on the negative one",
    )
    parser.add_argument("--negative", metavar="PROMPT", help="the negative branch's prompt (default: a picture)")
    parser.add_argument("--cfg", type=float, help="scale of guidance (default: 4 with --branch or --negative, else 1)")
    parser.add_argument("--grid", metavar="W,W,…", help="an image for each factor on the LoRA weights")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--size", type=int, default=256, help="side of an image in pixels (default: 256)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.set_defaults(run=_draw)

    parser = subparsers.add_parser(
        "report",
        help="measure the table of claims again",
        description="Measures every claim on pictures that were not in the training data and writes the table and its "
        "images. The exit code is 1 if a figure is worse than it should be.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer pictures, and nothing is written: for CI")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="one row of the table; repeatable")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FOLDER",
        help="the folder of a training run, for example runs/mini (default: the shipped weights)",
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another training run, to compare with")
    parser.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="keep the results of trainings here, and go on with those there"
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help="default: docs/claims.md; with --only nothing, or the file whose other rows stay as they are",
    )
    parser.set_defaults(run=_report)


def _needs_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise UserError("mini needs the package diffusers: pip install 'image-to-lora[mini]'.") from None


def _parse_weighted(text: str) -> tuple[Path, float]:
    """FILE:WEIGHT or FILE. A colon without a number after it belongs to the file's name, as in C:\\."""
    name, colon, weight = text.rpartition(":")
    try:
        return (Path(name), float(weight)) if colon and name else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _draw(args: argparse.Namespace) -> int:
    """Raises UserError for an unknown word, a missing LoRA, and a LoRA of another base model."""
    _needs_diffusers()
    from i2l_ext.branch import Strength
    from i2l_ext.converters.atomic import atomic_path
    from i2l_ext.converters.lora import Lora
    from i2l_ext.mini.prompts import find_lora_file, split_lora_tags
    from i2l_ext.mini.sampler import NEGATIVE_PROMPT, Sampler, as_image
    from i2l_ext.mini.sheets import image_grid

    prompt, tags = split_lora_tags(args.prompt)
    files = [_parse_weighted(text) for text in args.lora]
    files += [(find_lora_file(name, args.lora_dir), weight) for name, weight in tags]
    loras = [(Lora.read(path), weight) for path, weight in files]
    try:
        factors = [float(part) for part in args.grid.split(",")] if args.grid else [1.0]
    except ValueError:
        raise UserError(f"--grid {args.grid}: write numbers with commas between them, as in 0,0.5,1.") from None
    if not 32 <= args.size <= 4096:
        raise UserError(f"--size {args.size}: choose 32 to 4096 pixels.")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: a seed is 0 or greater.")

    cfg = args.cfg if args.cfg is not None else CFG if args.branch or args.negative else 1.0
    if not 1 <= cfg <= 30:
        raise UserError(f"--cfg {cfg:g}: choose 1 to 30; 1 has no negative branch.")
    if cfg == 1 and (args.branch or args.negative):
        raise UserError("--cfg 1 has no negative branch: leave --branch and --negative out, or choose another --cfg.")
    greys = [(Lora.read(_grey_file(path)), weight) for path, weight in files] if args.branch == "grey" else []

    sampler = Sampler()
    adapter = sampler.adapter([lora for lora, _ in (*loras, *greys)]) if cfg != 1 else None
    images = []
    for factor in factors:
        if adapter is None:
            images += sampler.images(
                [prompt], [args.seed], [(lora, weight * factor) for lora, weight in loras], args.size
            )
            continue
        on_both = args.branch in (None, "both")
        strengths = [Strength(weight * factor, weight * factor * on_both) for _, weight in loras]
        strengths += [Strength(0.0, weight * factor) for _, weight in greys]
        negative = args.negative or NEGATIVE_PROMPT
        pixels = sampler.generate_guided(adapter, strengths, [prompt], [args.seed], cfg, negative)
        images.append(as_image(pixels[0], args.size))
    image = images[0] if len(images) == 1 else image_grid([images], args.grid.split(","), args.size)
    if not args.out.parent.is_dir():
        raise UserError(f"The folder {args.out.parent} does not exist.")
    with atomic_path(args.out, overwrite=args.overwrite) as part:
        image.save(part, format="PNG")
    print(args.out)
    return 0


def _grey_file(path: Path) -> Path:
    """The grey LoRA of a LoRA. Raises UserError where there is none."""
    grey = path.with_name(f"{names.grey_name(path.stem)}.safetensors")
    if not grey.is_file():
        raise UserError(
            f"There is no {grey.name} beside {path.name}. Make it of a grey picture: "
            f"i2l make GREY.png --name {grey.stem}."
        )
    return grey


def _report(args: argparse.Namespace) -> int:
    """Exit code 1, with a line on stderr for each, where a figure is worse than it should be."""
    _needs_diffusers()
    from i2l_ext.mini.report import run_report

    out = None if args.quick else args.out or (None if args.only else Path("docs/claims.md"))
    broken = run_report(args.weights, out, quick=args.quick, only=args.only, against=args.against, resume=args.resume)
    for line in broken:
        print(f"i2l: {line}", file=sys.stderr)
    return 1 if broken else 0
