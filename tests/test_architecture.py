"""The house: arrows point down, files are one sitting long, and a name stands for one thing."""

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 400
"""Lines of a module."""


def test_the_hooks_of_pre_commit_find_nothing():
    """Those that look for a pattern, over the files that they look into: a commit to a clean tree must pass."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    patterns = [hook for repo in hooks for hook in repo["hooks"] if hook.get("language") == "pygrep"]
    assert len(patterns) == 2
    ours = [
        path
        for room in ("converters", "i2l_ext", "benchmarks", "scripts", "tests")
        for path in (ROOT / room).rglob("*.py")
    ]
    for hook in patterns:
        names = {path.relative_to(ROOT).as_posix(): path for path in ours}
        seen = [
            path
            for name, path in names.items()
            if re.search(hook["files"], name) and not re.search(hook.get("exclude", "^$"), name)
        ]
        assert len(seen) > 20
        found = [path for path in seen if re.search(hook["entry"], path.read_text(encoding="utf-8"), re.MULTILINE)]
        assert found == [], hook["name"]


SHARED = {
    "register": "every module of commands adds its commands by it",
    "main": "each of the two programs begins with it",
    "structure": "every encoder gives its {key: shape} by it",
    "config": "every encoder gives its transformers configuration by it",
    "encode": "every encoder turns pixels into embeddings by it",
    "initialize": "every trainer's hook sets the factors of a network by it",
}
"""Function names that several modules have, because all of them fill the same place of one table."""


def modules():
    return sorted(path for room in ("i2l_ext", "converters") for path in (ROOT / room).rglob("*.py"))


def lint(tree):
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", str(tree / "pyproject.toml")]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path):
    """The package as a wheel lays it out."""
    away = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "i2l_ext", tmp_path / "i2l_ext", ignore=away)
    shutil.copytree(ROOT / "converters", tmp_path / "i2l_ext" / "converters", ignore=away)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_arrows_point_down_and_one_that_points_up_would_be_seen(tree):
    pytest.importorskip("importlinter")
    ended = lint(tree)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    with (tree / "i2l_ext" / "library" / "names.py").open("a") as stream:
        stream.write("\n\ndef up():\n    from i2l_ext import pipeline\n")
    ended = lint(tree)
    assert ended.returncode == 1 and "i2l_ext.library.names -> i2l_ext.pipeline" in ended.stdout


def test_nothing_is_exempt_from_the_arrows():
    assert "ignore_imports" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_no_module_is_too_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    long = {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > LONGEST}
    assert not long, f"at most {LONGEST} lines"


@pytest.mark.parametrize("kind", [ast.ClassDef, ast.FunctionDef])
def test_a_public_name_stands_for_one_thing(kind):
    places = defaultdict(list)
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, kind) and not node.name.startswith("_") and node.name not in SHARED:
                places[node.name].append(str(path.relative_to(ROOT)))
    assert not {name: where for name, where in places.items() if len(where) > 1}


@pytest.mark.parametrize("module", ["i2l_ext.commands.main", "i2l_ext.worker.main", "i2l_ext.operations"])
def test_the_programs_begin_with_the_standard_library_alone(module):
    """What they import later may lie in the private folder, which is put on the path first."""
    code = (
        f"import sys; old = set(sys.modules); import {module}; "
        "new = {name.partition('.')[0] for name in sys.modules.keys() - old}; "
        "print(*sorted(name for name in new - sys.stdlib_module_names if name not in ('i2l_ext', '_distutils_hack')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.strip() == ""
