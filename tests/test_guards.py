"""The table of guards fits the code, so that ``python benchmarks/guards.py`` takes out what it says."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("guards", ROOT / "benchmarks" / "guards.py")
guards = importlib.util.module_from_spec(spec)
sys.modules["guards"] = guards  # where its dataclass looks for itself
spec.loader.exec_module(guards)


@pytest.mark.parametrize("guard", guards.GUARDS, ids=lambda guard: guard.what)
def test_every_guard_stands_once(guard):
    text = (ROOT / guard.file).read_text(encoding="utf-8")
    assert text.count(guard.text) == 1
    compile(text.replace(guard.text, guard.instead), guard.file, "exec")
    assert (ROOT / f"{guard.tests.partition('.py ')[0]}.py").is_file()


def test_the_tests_that_trust_is_built_on_are_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")))
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named and not [name for name in named if f"def {name}(" not in written]


def test_what_is_recorded_are_guards_that_were_noticed():
    recorded = (ROOT / "benchmarks" / "TRUST.md").read_text(encoding="utf-8").partition(guards.MARKS[0])[2]
    rows = re.findall(r"^\| (.+?) \| \S+ \| \S+ \| (\d+) \|$", recorded.partition(guards.MARKS[1])[0], re.MULTILINE)
    assert rows and all(int(count) for _, count in rows)
    assert {what for what, _ in rows} <= {guard.what for guard in guards.GUARDS}
