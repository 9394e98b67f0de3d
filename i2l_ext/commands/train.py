"""``i2l train``: trains what a configuration describes, and goes on with what is there."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from i2l_ext.converters.errors import UserError


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``train``."""
    parser = subparsers.add_parser(
        "train",
        help="train an i2L model from a configuration (YAML)",
        description="Trains an i2L model. Started again with the same configuration it goes on where it was; "
        "`accelerate launch -m i2l_ext train CONFIG` takes the same configuration to many GPUs.",
    )
    parser.add_argument("config", type=Path, help="for example configs/train/mini.yaml")
    parser.add_argument("--output", help="another folder for the results than the configuration's")
    parser.add_argument("--only", metavar="STEP", help="one step: base, examples, or an expert's name, for example")
    parser.add_argument("--list", action="store_true", help="show the steps and which of them are done")
    parser.set_defaults(run=train)


def train(args: argparse.Namespace) -> int:
    """Raises UserError for a wrong configuration, one line."""
    from dataclasses import replace

    from i2l_ext.training import config as configuration

    config = configuration.read(args.config)
    if args.output:
        config = replace(config, output=args.output)
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        raise UserError(f"Training needs the package {error.name}: pip install 'image-to-lora[train]'.") from None
    from i2l_ext.training.run import Plan, command_of

    torch.set_num_threads(config.threads)
    plan = Plan(config, lambda line: print(line, file=sys.stderr, flush=True))
    if args.only and args.only not in plan.steps:
        raise UserError(f"There is no step {args.only!r}. There are: {', '.join(plan.steps)}.")
    if args.list:
        for name in plan.steps:
            print(f"{'done' if plan.done(name) else 'open'}  {name}")
        return 0
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if args.only or not alone or config.lanes < 2:
        plan.run(args.only)
    else:
        output = ["--output", args.output] if args.output else []
        plan.run_lanes([*command_of(args.config), *output])
    print(plan.folder)
    return 0
