"""The types hold: mypy over the whole package, laid out as in a wheel, where ``converters`` lies inside it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).resolve().parent.parent


def check(tree, *options):
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *options]
    command += ["--cache-dir", ROOT / ".mypy_cache", "--python-executable", sys.executable]
    return subprocess.run(list(map(str, command)), cwd=tree, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path):
    away = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "i2l_ext", tmp_path / "i2l_ext", ignore=away)
    shutil.copytree(ROOT / "converters", tmp_path / "i2l_ext" / "converters", ignore=away)
    return tmp_path


def test_the_types_hold_and_a_wrong_one_would_be_seen(tree):
    for system in ("linux", "win32", "darwin"):
        ended = check(tree, "--platform", system)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    with (tree / "i2l_ext" / "library" / "names.py").open("a") as stream:
        stream.write('\nLONGEST + "characters"\n')
    assert check(tree).returncode == 1


def test_nothing_of_ours_is_exempt():
    """No module of the package is ignored, and no line but by the name of its error."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    named = [name for override in settings["overrides"] for name in override["module"]]
    assert not [name for name in named if name.startswith(("i2l_ext", "converters", "*"))]
    for folder in ("i2l_ext", "converters"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "# type: ignore\n" not in text and "# mypy:" not in text, path
