"""The script that starts a trainer of many options: Python, which every trainer's user has, on Windows too.

It builds lists of arguments and hands them over without a shell, so that no name is read as anything but a name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .base import TODO

CONFIGURATIONS = (".toml", ".yaml", ".json")
"""Endings of the configurations that are written beside the script."""

LAUNCH = "python -m accelerate.commands.launch"
"""What `accelerate launch` is, without a program of that name on the path."""


def training_script(
    title: str, places: Mapping[str, str], commands: Sequence[str], values: Mapping[str, str] | None = None
) -> str:
    """The text of train.py, which runs ``commands`` one after another, in the trainer's folder. It starts nothing
    while a place is missing, or a place that is a text file has one to fill in (`TODO`), and names them all.

    ``places``: NAME -> path, at the top of the script, where a user fills in what is not known; ``values``: NAME ->
    another text of that kind. A command is words with spaces between them; ``python`` stands for the Python that runs
    the script, ``$NAME`` for a place or a value.
    """
    named = {**places, **(values or {})}
    top = [f"{name} = {text!r}" for name, text in named.items()]
    lists = [line for command in commands for line in _argument_list(command.split(), named)]
    return "\n".join(
        [
            f'"""Starts {title}. Run this with its Python, in its folder."""',
            "",
            "import subprocess",
            "import sys",
            "from pathlib import Path",
            "",
            *top,
            "",
            "missing = []",
            f"for place in ({', '.join(places)}):",
            "    if not Path(place).exists():",
            '        missing.append(f"{place}: no such file or folder. Fill in the paths at the top of {__file__}.")',
            f"    elif Path(place).suffix in {CONFIGURATIONS}:",
            '        for number, line in enumerate(Path(place).read_text(encoding="utf-8").splitlines(), 1):',
            f"            if '\"{TODO}/' in line:",
            '                missing.append(f"{place}, line {number}: fill in this path: {line.strip()}")',
            "if missing:",
            '    sys.exit("\\n".join(missing))',
            "",
            "COMMANDS = [",
            *lists,
            "]",
            "for command in COMMANDS:",
            "    if code := subprocess.run(command).returncode:",
            "        sys.exit(code)",
            "",
        ]
    )


def _argument_list(words: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """The lines of a Python list of ``words``: an option and its values on a line each."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        known = {"python": "sys.executable", **{f"${name}": name for name in places}}
        lines[-1].append(known.get(word, repr(word)))
    return ["    [", *(f"        {', '.join(line)}," for line in lines), "    ],"]
