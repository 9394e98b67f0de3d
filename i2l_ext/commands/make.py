"""``i2l make``: pictures in, a LoRA out."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from i2l_ext.commands.arguments import add_arguments, add_engine_options, engine_options_of, request_of
from i2l_ext.converters import consumers
from i2l_ext.converters.generation import GenerationSettings
from i2l_ext.operations.bars import bars
from i2l_ext.requests import MakeRequest

if TYPE_CHECKING:
    from i2l_ext.pipeline import MakeResult


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = subparsers.add_parser("make", help="make a LoRA from pictures", description="Make a LoRA from pictures.")
    add_arguments(parser, MakeRequest)
    parser.add_argument("--each", action="store_true", help="a LoRA for each picture or sub-folder; can be resumed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine_options(parser)
    parser.set_defaults(run=run_make)


def run_make(args: argparse.Namespace) -> int:
    """Make the LoRA, or one for each picture, and print what came of it. 1 where one of several could not be made."""
    from i2l_ext.operations import Context
    from i2l_ext.operations.make import make_lora, make_loras
    from i2l_ext.pipeline import MakeResult

    request, failed = request_of(args, MakeRequest), 0
    with bars() as reporter:
        context = Context(engine_options_of(args), reporter)
        for made in make_loras(request, context) if args.each else [make_lora(request, context)]:
            if isinstance(made, MakeResult):
                print_made(made, args.json)
            else:
                failed += not made.done
                print(f"i2l: {made.name}: {made.reason}", file=sys.stderr)
    return 1 if failed else 0


def print_made(made: MakeResult, as_json: bool) -> None:
    """Print what came of it."""
    if as_json:
        print(json.dumps(made.json()), flush=True)
        return
    print(f"{made.file}\n{made.prompt}")
    took = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in made.seconds.items())
    print(f"{made.model}: rank {made.rank}, {made.modules} modules, {made.bytes / 1e6:.1f} MB; {took}")
    if made.settings:
        print(f"settings of the authors: {GenerationSettings(**made.settings).line}")
    print(consumers.summary(made.file), flush=True)
