"""The script that starts a trainer of many options: Python, which every trainer's user has, on Windows too.

It builds lists of arguments and hands them over without a shell, so that no name is read as anything but a name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .base import TODO, TrainingStart

CONFIGURATIONS = (".toml", ".yaml", ".json")
"""Endings of the configurations that are written beside the script."""

LAUNCH = "python -m accelerate.commands.launch"
"""What `accelerate launch` is, without a program of that name on the path."""


NOT_STARTED = 78
"""The exit code of train.py where it started nothing: EX_CONFIG of sysexits.h."""


def training_script(
    start: TrainingStart,
    title: str,
    places: Mapping[str, str],
    commands: Sequence[str],
    values: Mapping[str, str] | None = None,
    hints: Mapping[str, str] | None = None,
) -> str:
    """The text of train.py, which runs ``commands`` one after another, in the trainer's folder. It starts nothing, and
    says all that is wrong, where no trainer has the model, outside that folder, without a package that the commands
    need, while a place is missing, and while a place that is a text file has one to fill in (`TODO`). It ends with
    `NOT_STARTED` then. A place that is missing is told with its NAME and its hint.

    ``places``: NAME -> path, at the top of the script, where a user fills in what is not known; ``values``: NAME ->
    another text of that kind; ``hints``: NAME -> what to fill in, for places that are not known. A command is words
    with spaces between them; ``python`` stands for the Python that runs the script, ``$NAME`` for a place or a value.
    """
    places = {name: start.place(name, path) for name, path in places.items()}
    named = {**places, **(values or {})}
    hints = {name: hint for name, hint in (hints or {}).items() if places[name].startswith(f"{TODO}/")}
    top = [f"{name} = {text!r}{f'  # {hints[name]}' if name in hints else ''}" for name, text in named.items()]
    checked = [f"({name!r}, {name}, {f' ({hints[name]})' if name in hints else ''!r})" for name in places]
    lists = [line for command in commands for line in _argument_list(command.split(), named)]
    scripts = dict.fromkeys(
        word for command in commands for word in command.split() if re.fullmatch(r"\w\S*\.py", word)
    )
    packages = dict.fromkeys(re.findall(r"python -m (\w+)", " ".join(commands)))
    return "\n".join(
        [
            f'"""Starts {title}. Run this with its Python, in its folder."""',
            "",
            "import subprocess",
            "import sys",
            "from importlib.util import find_spec",
            "from pathlib import Path",
            "",
            *top,
            "",
            f"missing = {[start.obstacle] if start.obstacle else []!r}",
            f"for script in {[*scripts]}:",
            "    if not Path(script).exists():",
            f'        missing.append(f"{{script}} is not in this folder: run this in that of {title}")',
            f"for package in {[*packages]}:",
            "    if find_spec(package) is None:",
            f'        missing.append(f"{{package}} is not in {{sys.executable}}: run this with the Python of {title}")',
            "absent = []",
            f"for name, place, wanted in ({', '.join(checked)}):",
            "    if not Path(place).exists():",
            '        absent.append(f"{name}: {place}: no such file or folder{wanted}")',
            f"    elif Path(place).suffix in {CONFIGURATIONS}:",
            '        for number, line in enumerate(Path(place).read_text(encoding="utf-8").splitlines(), 1):',
            f"            if '\"{TODO}/' in line:",
            '                missing.append(f"{place}, line {number}: fill in this path: {line.strip()}")',
            "if absent:",
            '    missing += [f"Fill in these paths at the top of {__file__}:", *absent]',
            "if missing:",
            '    print("\\n".join(missing), file=sys.stderr)',
            f"    sys.exit({NOT_STARTED})",
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


def read_places(script: Path) -> dict[str, str]:
    """NAME -> path at the top of a train.py; nothing where there is none, or its user has broken it."""
    try:
        body = ast.parse(script.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return {}
    named = [node for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    return {
        node.targets[0].id: node.value.value
        for node in named
        if isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
    }


def _argument_list(words: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """The lines of a Python list of ``words``: an option and its values on a line each."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        known = {"python": "sys.executable", **{f"${name}": name for name in places}}
        lines[-1].append(known.get(word, repr(word)))
    return ["    [", *(f"        {', '.join(line)}," for line in lines), "    ],"]
