"""``i2l demo``: the main job on what is built in, with a picture to look at."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from i2l_ext.converters.errors import UserError

STYLE = "meadow"
"""The shipped sample pictures of one style that the demo takes: of different shapes, so that only the style is theirs
in common."""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    demo = subparsers.add_parser(
        "demo",
        help="make a LoRA from shipped pictures with the miniature, and draw with it",
        description="Make a LoRA from shipped pictures with the built-in miniature, and draw with it: one picture that "
        "shows the references, drawings without the LoRA, and with it at several weights.",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for what comes of it (default: demo)")
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the LoRA and the picture."""
    try:
        from i2l_ext.mini import draw
    except ImportError as error:
        raise UserError(
            f"The demo draws, for which {error.name} is missing: pip install 'image-to-lora[mini]'."
        ) from None
    from PIL import Image

    from i2l_ext.commands.bars import bars
    from i2l_ext.commands.make import show
    from i2l_ext.converters.atomic import appearing
    from i2l_ext.converters.lora import Lora
    from i2l_ext.operations import Context
    from i2l_ext.operations.make import make
    from i2l_ext.requests import EngineOptions, MakeRequest

    pictures = sorted(draw.SAMPLES.glob(f"{STYLE}-*.png"))
    print(f"{len(pictures)} pictures of one style become a LoRA", file=sys.stderr)
    with bars() as reporter:
        context = Context(EngineOptions(device="cpu", precision="bf16", cache_bytes=0), reporter)
        made = make(MakeRequest(tuple(pictures), STYLE, args.out, model="mini", overwrite=True), context)
    show(made, as_json=False)

    print("drawing without it, and with it", file=sys.stderr)
    references = [Image.open(picture).convert("RGB") for picture in pictures]
    sheet = draw.contact_sheet(draw.Painter(), references, Lora.read(made.file))
    with appearing(args.out / "demo.png", overwrite=True) as part:
        sheet.save(part, format="PNG")
    print(args.out / "demo.png")
    print(f'Next: i2l draw --prompt "a star <lora:{made.name}:0.5>" --lora-dir {args.out} -o star.png', file=sys.stderr)
    return 0
