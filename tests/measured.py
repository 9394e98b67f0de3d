"""How much of what files depend on do the tests run? Lines and branches of four parts, each with a bound.

    python tests/measured.py [--all] [--out benchmarks/TRUST.md]

Runs the tests of these parts under coverage, and with ``--all`` the others without, two processes at a time. Ends
with code 1 where a test fails or a part is below its bound. With ``--out`` the table goes into the file, between the
marks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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


def others() -> list[list[str]]:
    """The other files, in two halves, and those of the browser alone: their client keeps an event loop."""
    names = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/test_*.py"))
    rest = [name for name in names if name not in files()]
    return [rest[1::2], rest[::2], ["tests/browser"]]


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
    head = f"`python tests/measured.py --out benchmarks/TRUST.md`, bound {BOUND:.0f} %:"
    return "\n".join((head, "", "| part | lines | branches | run by its tests |", "|---|---|---|---|", *rows)), low


def run_two_at_a_time(commands: Sequence[Sequence[str]]) -> int:
    """What each prints is shown when it has ended."""

    def told(command: Sequence[str]) -> int:
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(ended.stdout.decode(errors="replace"), flush=True)
        return ended.returncode

    print(f"The tests run in {len(commands)} processes, two at a time; each tells when it has ended.", flush=True)
    with ThreadPoolExecutor(2) as pool:
        return max(pool.map(told, commands))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        data, report = f"--data-file={folder}/coverage", Path(folder, "coverage.json")
        coverage = [sys.executable, "-m", "coverage"]
        measured = [*coverage, "run", data, "-m", "pytest", *files()]
        if "--all" in sys.argv:
            code = run_two_at_a_time([*([sys.executable, "-m", "pytest", *names] for names in others()), measured])
        else:
            code = subprocess.run(measured, cwd=ROOT).returncode
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
