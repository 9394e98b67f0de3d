"""Writes the reference of all commands: ``python -m i2l_ext.commands.reference > docs/commands.md``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from i2l_ext.commands.main import parser

HEAD = """# Every command

Written by `python -m i2l_ext.commands.reference`; a test compares. `i2l COMMAND --help` says the same.
"""


def reference() -> str:
    """The page, in Markdown."""
    return "\n".join([HEAD, *_sections(parser())]).rstrip() + "\n"


def _sections(command: argparse.ArgumentParser) -> Iterator[str]:
    """A section of the command, and those of its commands."""
    below = [action for action in command._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield from (f"## `{command.prog}`", "", command.description or "", "", *_table(command), "")
    for group in below:
        for one in dict.fromkeys(group.choices.values()):
            yield from _sections(one)


def _table(command: argparse.ArgumentParser) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    for action in command._actions:
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            told = (action.help or "") % {**vars(action), "prog": command.prog}
            yield f"| `{_name(action)}` | {told.replace('|', chr(92) + '|')} |"


def _name(action: argparse.Action) -> str:
    """``-o, --output OUTPUT``, the same with every version of Python."""
    value = action.metavar or (f"{{{','.join(action.choices)}}}" if action.choices else action.dest.upper())
    value = value if isinstance(value, str) else " ".join(value)
    if not action.option_strings:
        return value
    return ", ".join(action.option_strings) + (f" {value}" if action.nargs != 0 else "")


if __name__ == "__main__":
    print(reference(), end="")
