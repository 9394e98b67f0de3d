"""The command ``i2l``: one table of commands, one place where errors become a line and an exit code.

Exit codes: 0 done; 1 something the user can put right, told in one line; 2 wrong usage; 130 stopped by the user.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import PurePath

from i2l_ext import __version__, private_packages, runtime
from i2l_ext.commands import demo, doctor, lora_files, make, mini, models, train, ui
from i2l_ext.converters.errors import UserError, printable

COMMANDS = (make, lora_files, models, mini, train, demo, doctor, ui)
"""Modules whose ``register(subparsers)`` adds commands. They import nothing heavy until a command runs."""


class Parser(argparse.ArgumentParser):
    """argparse, whose errors tell the whole usage in one line; where a command is missing, with the list of them."""

    def error(self, message: str) -> None:  # type: ignore[override]
        groups = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        due = [one for group in groups if message.endswith(str(group.metavar)) for one in group._choices_actions]
        listed = [f"  {one.dest:<10}{one.help}" for one in due]
        self.exit(2, "\n".join([f"{self.prog}: {message} (see {self.prog} --help)", *listed, ""]))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(prog="i2l", description="Pictures in, a LoRA out.")
    top.add_argument("--version", action="version", version=f"i2l {__version__}")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.register(subparsers)
    return top


def as_typed(message: str, words: Sequence[str]) -> str:
    """The message, with the path that was typed where it begins with the name of its file: the tab and HTTP, which get
    the same messages, must not tell folders. A name that was typed in two folders stays a name."""
    name, mark, rest = message.partition(": ")
    values = {word.partition("=")[2] if word.startswith("--") else word for word in words}
    paths = values | {value.rpartition(":")[0] for value in values}  # FILE:WEIGHT
    typed = [path for path in paths if PurePath(path).name == name]
    return f"{printable(typed[0])}{mark}{rest}" if mark and len(typed) == 1 else message


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    private_packages.add_to_path()
    runtime.configure_process()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that lacks a letter is no reason to fail
    words = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(words)
    try:
        return args.run(args)
    except UserError as error:
        print(f"i2l: {as_typed(str(error), words)}", file=sys.stderr)
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
