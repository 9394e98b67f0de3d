"""How much of what files depend on do the tests run? Lines and branches of four parts, each with a bound.

    python tests/measured.py [--all] [--out docs/trust.md]

Runs the tests of these parts under coverage, and with ``--all`` beside them, in a second process, the others without:
two processors are what most machines have. Ends with code 1 where a test fails or a part is below its bound. With
``--out`` the table goes into the file, between the marks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKS = "<!-- coverage -->", "<!-- /coverage -->"
BOUND = 90.0
"""Per cent of lines and branches together."""

PARTS: Mapping[str, str | tuple[str, ...]] = {
    "converters": "converters/",
    "library": "i2l_ext/library/folder.py",
    "store": "i2l_ext/models/store.py",
    "queue": ("i2l_ext/engine/job.py", "i2l_ext/engine/queue.py", "i2l_ext/engine/records.py"),
}
TESTS = ("converters_*", "trainers", "library", "folders", "store", "queue", "queue_faults")
"""The files of tests/ that are about them."""


def files() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for name in TESTS for path in ROOT.glob(f"tests/test_{name}.py"))


def percent(counts: list[Mapping[str, int]]) -> float:
    """Of lines and branches together, as coverage itself counts."""
    done = sum(one["covered_lines"] + one["covered_branches"] for one in counts)
    return 100 * done / max(sum(one["num_statements"] + one["num_branches"] for one in counts), 1)


def table(measured: Mapping[str, Mapping[str, Mapping[str, int]]]) -> tuple[str, list[str]]:
    """The table, and the parts below the bound."""
    rows, low = [], []
    for part, start in PARTS.items():
        counts = [facts["summary"] for path, facts in measured.items() if Path(path).as_posix().startswith(start)]
        share = percent(counts)
        lines, branches = (sum(one[f"num_{what}"] for one in counts) for what in ("statements", "branches"))
        rows.append(f"| {part} | {lines} | {branches} | {share:.1f} % |")
        low += [part] if share < BOUND else []
    head = f"`python tests/measured.py --out docs/trust.md`, bound {BOUND:.0f} %:"
    return "\n".join((head, "", "| part | lines | branches | run by its tests |", "|---|---|---|---|", *rows)), low


def run(command: Sequence[str]) -> int:
    return subprocess.run(command, cwd=ROOT).returncode


def beside(first: Sequence[str], second: Sequence[str], told: Path) -> int:
    """Run both at once. What the ``first`` one prints is kept in the file ``told`` and shown when both have ended."""
    print("The tests of the measured parts run beside these; what they say follows at the end.", flush=True)
    with told.open("wb") as stream, subprocess.Popen(first, cwd=ROOT, stdout=stream, stderr=stream) as process:
        code = run(second)
        code = process.wait() or code
    print(told.read_text(encoding="utf-8", errors="replace"))
    return code


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        data, report = f"--data-file={folder}/coverage", Path(folder, "coverage.json")
        coverage = [sys.executable, "-m", "coverage"]
        measured = [*coverage, "run", data, "-m", "pytest", *files()]
        others = [sys.executable, "-m", "pytest", *(f"--ignore={name}" for name in files())]
        code = beside(measured, others, Path(folder, "measured.txt")) if "--all" in sys.argv else run(measured)
        subprocess.run([*coverage, "json", data, "-q", "-o", str(report)], cwd=ROOT, check=True)
        text, low = table(json.loads(report.read_text(encoding="utf-8"))["files"])
    print(text)
    if "--out" in sys.argv:
        out = ROOT / sys.argv[sys.argv.index("--out") + 1]
        before, _, rest = out.read_text(encoding="utf-8").partition(MARKS[0])
        out.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")
    if low:
        print(f"Below {BOUND:.0f} %: {', '.join(low)}.")
    return code or int(bool(low))


if __name__ == "__main__":
    sys.exit(main())
