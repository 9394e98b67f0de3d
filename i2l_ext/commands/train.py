"""``i2l train``: trains what a configuration describes, or continues such a run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters.errors import UserError

if TYPE_CHECKING:
    from i2l_ext.training.base import TrainingBase
    from i2l_ext.training.config import TrainingConfig


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add ``train``."""
    parser = subparsers.add_parser(
        "train",
        help="train an i2L model from a configuration (YAML)",
        description="Trains an i2L model. The same command continues a run that was stopped. "
        "`accelerate launch -m i2l_ext train CONFIG` trains on several GPUs.",
    )
    parser.add_argument("config", type=Path, help="for example configs/train/mini.yaml")
    parser.add_argument("--output", help="folder for the results, instead of the one in the configuration")
    parser.add_argument("--only", metavar="STEP", help="one step, as --list shows them")
    parser.add_argument("--list", action="store_true", help="show the steps and which of them are done")
    parser.set_defaults(run=_train)


def _bases() -> dict[str, Callable[[TrainingConfig], TrainingBase]]:
    """The base models that can be trained for, by ``base.kind`` of the configuration."""
    from i2l_ext.mini.training import MiniTraining
    from i2l_ext.training.qwen_image import QwenImageTraining

    return {"mini": MiniTraining, "qwen-image": QwenImageTraining}


def _train(args: argparse.Namespace) -> int:
    """Raises UserError, one line, for a wrong configuration and for a step that fails."""
    from dataclasses import replace

    from i2l_ext.training.config import read_config

    config = read_config(args.config)
    if args.output:
        config = replace(config, output=args.output)
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        raise UserError(f"Training needs the package {error.name}: pip install 'image-to-lora[train]'.") from None
    from i2l_ext.training.plan import TrainingPlan, train_command

    torch.set_num_threads(config.threads)
    base = _bases()[config.base.kind](config)
    plan = TrainingPlan(config, base, lambda line: print(line, file=sys.stderr, flush=True))
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
        plan.run_parallel([*train_command(args.config), *output])
    print(plan.folder)
    return 0
