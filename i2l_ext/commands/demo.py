"""``i2l demo``: a LoRA made from shipped pictures with mini, and images generated with it."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.shell import shell_word

STYLE, OTHER = "meadow", "velvet"
"""The sample pictures that the demo uses. Those of a style show different things: they share only the style."""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    demo = subparsers.add_parser(
        "demo",
        help="make a LoRA from shipped pictures with mini, and generate images with it",
        description="Makes LoRAs from shipped pictures of two styles with mini, the built-in test model. Writes an "
        "image that shows the pictures, what mini generates without a LoRA and with it at several LoRA weights, and "
        "both styles mixed.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for the LoRA and the image (default: demo)"
    )
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    """Write the LoRAs and the image."""
    try:
        from i2l_ext.mini.sampler import SAMPLES, Sampler
        from i2l_ext.mini.sheets import demo_sheet
    except ImportError as error:
        raise UserError(
            f"The demo generates images, for which {error.name} is missing: pip install 'image-to-lora[mini]'."
        ) from None
    from PIL import Image

    from i2l_ext.commands.make import print_made
    from i2l_ext.converters.atomic import atomic_path
    from i2l_ext.converters.lora import Lora
    from i2l_ext.operations import Context
    from i2l_ext.operations.bars import bars
    from i2l_ext.operations.make import make_lora
    from i2l_ext.requests import EngineOptions, MakeRequest

    pictures = sorted(SAMPLES.glob(f"{STYLE}-*.png"))
    print(f"making a LoRA from {len(pictures)} pictures of one style", file=sys.stderr)
    with bars() as reporter:
        context = Context(EngineOptions(device="cpu", precision="bf16", cache_bytes=0), reporter)
        made = make_lora(MakeRequest(tuple(pictures), STYLE, args.out, model="mini", overwrite=True), context)
    print_made(made, as_json=False)
    other = SAMPLES / f"{OTHER}.png"
    print("making another from one picture of another style", file=sys.stderr)
    with bars() as reporter:
        context = Context(EngineOptions(device="cpu", precision="bf16", cache_bytes=0), reporter)
        mixed = make_lora(MakeRequest((other,), OTHER, args.out, model="mini", overwrite=True), context)

    print("generating images without them and with them", file=sys.stderr)
    references = [Image.open(picture).convert("RGB") for picture in pictures]
    sheet = demo_sheet(
        Sampler(), references, Lora.read(made.file), Image.open(other).convert("RGB"), Lora.read(mixed.file)
    )
    with atomic_path(args.out / "demo.png", overwrite=True) as part:
        sheet.save(part, format="PNG")
    print(args.out / "demo.png")
    asked = f'draw --prompt "a star <lora:{made.name}:0.5>" --lora-dir {shell_word(str(args.out))} -o star.png'
    print(f"Next: {own_command()} {asked}", file=sys.stderr)
    return 0


def own_command() -> str:
    """What to type for `i2l` in the folder where the user is: bare only where the shell finds this very one. Quoted."""
    beside = Path(sys.executable).with_name("i2l.exe" if sys.platform == "win32" else "i2l")
    found = shutil.which("i2l")
    if found and beside.is_file() and Path(found).samefile(beside):
        return "i2l"
    python = Path(sys.executable)
    path, rest = (beside.with_suffix(""), "") if beside.is_file() else (python, " -m i2l_ext")
    near = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return shell_word(str(near)) + rest
