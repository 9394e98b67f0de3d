"""The command ``i2l``: one table of commands, one place where errors become a line and an exit code.

Exit codes: 0 done; 1 something the user can put right, told in one line; 2 wrong usage; 130 stopped by the user.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from i2l_ext import __version__, private_packages, runtime
from i2l_ext.commands import demo, doctor, lora_files, make, mini, models, train, ui
from i2l_ext.converters.errors import UserError

COMMANDS = (make, lora_files, models, mini, train, demo, doctor, ui)
"""Modules whose ``register(subparsers)`` adds commands. They import nothing heavy until a command runs."""


class Parser(argparse.ArgumentParser):
    """argparse, whose errors tell the whole usage in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(prog="i2l", description="Pictures in, a LoRA out.")
    top.add_argument("--version", action="version", version=f"i2l {__version__}")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.register(subparsers)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    private_packages.add_to_path()
    runtime.configure_process()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that lacks a letter is no reason to fail
    args = parser().parse_args(arguments)
    try:
        return args.run(args)
    except UserError as error:
        print(f"i2l: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "i2l_ext"):
            raise
        advice = "Run `python install.py demo` in the checkout once, and then the i2l in .venv"
        print(f"i2l: this Python lacks the package {missing}. {advice}; or pip install the checkout.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("i2l: stopped; nothing was left behind.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `i2l … | head`
        sys.stdout = None
        return 0
