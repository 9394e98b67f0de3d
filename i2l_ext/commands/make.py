"""``i2l make``: pictures in, a LoRA out."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext import library
from i2l_ext.converters import consumers, dialects
from i2l_ext.converters.errors import UserError
from i2l_ext.library import names
from i2l_ext.weights.devices import PRECISIONS

if TYPE_CHECKING:
    from i2l_ext.pipeline import Made, Order

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
HOSTS = ("forge-neo", "forge", "a1111")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    make = subparsers.add_parser("make", help="make a LoRA from pictures", description="Make a LoRA from pictures.")
    make.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="a picture, or a folder of pictures")
    make.add_argument("--name", help="the LoRA's name (default: after the picture or the folder)")
    make.add_argument("--lora-dir", type=Path, help="the folder it goes to (default: the WebUI's models/Lora)")
    make.add_argument("--model", help="see `i2l models` (default: the first that is downloaded, else mini)")
    make.add_argument("--weights", nargs="+", type=float, metavar="W", help="how much each picture counts")
    make.add_argument("--strength", type=float, default=1.0, help="scales the whole update (default: 1)")
    make.add_argument("--to", "--format", dest="dialect", choices=dialects.DIALECTS, default=dialects.DEFAULT,
                      help=f"key names for whom (default: {dialects.DEFAULT})")  # fmt: skip
    make.add_argument("--dtype", choices=DTYPES, help="of the file (default: as made)")
    make.add_argument("--rank", type=int, metavar="K", help="reset to this rank, exactly (default: as made)")
    make.add_argument("--blocks", metavar="LIST", help="keep or scale blocks: 0-19 or 0-19:0.5,late:1.2")
    make.add_argument("--kinds", metavar="LIST", help="keep or scale kinds of layers: attn or txt:0,mlp:0.5")
    make.add_argument("--overwrite", action="store_true", help="replace a LoRA of that name")
    make.add_argument("--description", default="", help="shown on the LoRA's card")
    make.add_argument("--activation-text", default="", help="put into the prompt with the LoRA")
    make.add_argument("--host", choices=HOSTS, help="the WebUI whose model names the card has")
    make.add_argument("--each", action="store_true", help="a LoRA for each picture or sub-folder; can be resumed")
    make.add_argument("--json", action="store_true", help="print one JSON object")
    add_run_options(make)
    make.set_defaults(run=run)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Where and how the engine computes."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default)")
    parser.add_argument("--memory", type=memory, metavar="SIZE", help="bound on memory, such as 6GB")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the encoders; see `i2l doctor`")
    parser.add_argument("--no-cache", action="store_true", help="encode anew, and keep nothing of it")


def memory(text: str) -> int:
    """Bytes of "6GB", "800MB", "6G" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 6GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


MINIATURE = "mini"


def run(args: argparse.Namespace) -> int:
    """Make the LoRA and print what came of it."""
    from i2l_ext.commands.engine import cache, engine
    from i2l_ext.commands.progress import bars
    from i2l_ext.pipeline import Order, make

    model = args.model or default_model()
    folder = args.lora_dir or library.find_lora_folder(Path(__file__).resolve().parents[2])
    if folder is None:
        raise UserError("No LoRA folder was found from here. Name it: --lora-dir path/to/models/Lora")
    order = Order(
        pictures=args.pictures,
        name=names.suggest_name(args.pictures) if args.name is None else args.name,
        folder=folder,
        model=model,
        weights=args.weights,
        strength=args.strength,
        dialect=args.dialect,
        dtype=DTYPES.get(args.dtype),
        rank=args.rank,
        blocks=args.blocks,
        kinds=args.kinds,
        overwrite=args.overwrite,
        description=args.description,
        activation_text=args.activation_text,
        host=args.host or "",
    )
    if args.each:
        code = run_each(args, order)
    else:
        options = engine(args, model)
        with bars() as callbacks:
            show(make(order, options, callbacks, cache(args)), args.json)
        code = 0
    if args.model is None and model == MINIATURE:
        print(
            "i2l: no model is downloaded, so this is made with `mini`, the built-in miniature: try it with `i2l draw`. "
            "For Qwen-Image: i2l models download qwen-image-style (20.6 GB).",
            file=sys.stderr,
        )
    return code


def run_each(args: argparse.Namespace, template: Order) -> int:
    """A LoRA for each picture or sub-folder; exit code 1 when one could not be made."""
    from i2l_ext.batch import LeftOut, each, make_each, share
    from i2l_ext.commands.engine import cache, engine
    from i2l_ext.commands.progress import bars

    if args.name is not None or args.weights is not None:
        raise UserError("--each names and weighs each LoRA by itself: leave out --name and --weights.")
    orders, failed = share(each(args.pictures, template)), 0
    options = engine(args, template.model)
    with bars() as callbacks:
        for made in make_each(orders, options, callbacks, cache(args)) if orders else ():
            if isinstance(made, LeftOut):
                failed += not made.done
                print(f"i2l: {made.name}: {made.reason}", file=sys.stderr)
            else:
                show(made, args.json)
    return 1 if failed else 0


def show(made: Made, as_json: bool) -> None:
    """Print what came of it."""
    if as_json:
        print(json.dumps(made.json()), flush=True)
        return
    print(f"{made.file}\n{made.prompt}")
    took = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in made.seconds.items())
    print(f"{made.model}: rank {made.rank}, {made.modules} modules, {made.bytes / 1e6:.1f} MB; {took}")
    print(consumers.summary(made.file), flush=True)


def default_model() -> str:
    """The first downloaded model; without one the miniature."""
    from i2l_ext.models.store import listing

    return next((row.name for row in listing() if row.ready and any(part.repo for part in row.parts)), MINIATURE)
