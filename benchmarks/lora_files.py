"""The converter's figures, beside a plain file copy and the authors' rank reset, in one run.

    python benchmarks/lora_files.py [--folder DIR] [--rounds 7] [--peer 12 | --full] [--networks] [--json]
    python benchmarks/lora_files.py --busy [--json]     only: `i2l rank` beside a process that takes a processor

The files are made first, in DIR (about 2.5 GB; on the disk that is to be measured): 720 modules of Qwen-Image in
bfloat16, rank 20 (295 MB) and rank 48 (708 MB). Copies and conversions alternate, each to a new file that is written
through to the disk, each in a fresh process as on the command line (timed from after its imports); the fastest round
of each and the medians are told, as other work on the machine only ever adds time. Memory and the time of `inspect`
are those of whole processes. The peer's rank reset is timed on a sample of modules of every shape and scaled up by
how many there are of each, since all 720 take it minutes; --full runs them all. --networks times another thing alone:
a LoKr of all 720 modules (factor 16, both halves whole: of full rank) brought to a LoRA of rank 16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib import util
from pathlib import Path

import torch

from bench import ROOT
from i2l_ext.converters import Lora, rank
from i2l_ext.converters.architectures import QWEN_IMAGE
from i2l_ext.converters.files import WritePlan, write
from i2l_ext.converters.lora import FactorSpec
from results import record

SIZES = {20: "295 MB", 48: "708 MB"}
RESETS = ((40, 16, 25), (4, 16, 100))
"""From rank, to rank, how many times faster it has to be."""


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def random_lora(size: int, dtype: str = "BF16") -> Lora:
    generator = torch.Generator().manual_seed(size)
    specs = dict.fromkeys(QWEN_IMAGE.i2l_modules, FactorSpec(size, "F32"))

    def load(path: str) -> tuple[torch.Tensor, torch.Tensor]:
        d_out, d_in = QWEN_IMAGE.modules[path].shape
        return torch.randn(size, d_in, generator=generator), torch.randn(d_out, size, generator=generator)

    return Lora(QWEN_IMAGE, specs, load).cast(dtype)


TIMED = """
import os, shutil, sys, time
sys.path.insert(0, {root!r})
from i2l_ext.converters import Lora
source, target = sys.argv[1:]
start = time.perf_counter()
{work}
print(time.perf_counter() - start)
"""
COPY = """
shutil.copyfile(source, target)
with open(target, "rb+") as stream:
    os.fsync(stream.fileno())
"""
CONVERT = 'Lora.read(source).save(target, "webui")'


def measure_convert(folder: Path, rounds: int) -> list[dict[str, object]]:
    """Convert against copy, both to a new file on the same disk and through to it."""
    rows = []
    for size, label in SIZES.items():
        source, target = folder / f"rank{size}.safetensors", folder / "target.safetensors"
        random_lora(size).save(source, "kohya", overwrite=True)
        source.read_bytes()  # both read from the page cache
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for name, work in (("copy", COPY), ("convert", CONVERT)):
                target.unlink(missing_ok=True)
                os.sync()
                command = [sys.executable, "-c", TIMED.format(root=str(ROOT), work=work), str(source), str(target)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                times[name].append(float(done.stdout))
        best = {name: min(values) for name, values in times.items()}
        middle = {name: statistics.median(values) for name, values in times.items()}
        folded = peak_of_convert(folder, source, target)
        rows.append(
            {
                "work": f"convert {label}",
                "copy s": round(best["copy"], 3),
                "ours s": round(best["convert"], 3),
                "of copy's rate": round(best["copy"] / best["convert"], 2),
                "median": round(middle["copy"] / middle["convert"], 2),
                "bound": ">= 0.8",
            }
        )
        rows.append({"work": f"convert {label}: peak anonymous memory, MB", "bound": "<= 300", **folded})
    return rows


WATCH = """
import re, sys, threading, time
sys.path.insert(0, {root!r})
peak, done = 0, False
def look():
    global peak
    while not done:
        with open("/proc/self/status") as status:
            peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]))
        time.sleep(0.002)
watcher = threading.Thread(target=look); watcher.start()
from i2l_ext.commands.main import main
code = main(sys.argv[1:])
done = True; watcher.join()
print(f"peak {{peak}}", file=sys.stderr)
sys.exit(code)
"""


def peak_of_convert(folder: Path, source: Path, target: Path) -> dict[str, object]:
    """The largest anonymous memory of a whole process: bytes copied, and every number folded or cast (with torch)."""
    peaks = {}
    for name, extra in (("bytes copied", []), ("all computed", ["--blocks", "0-59:0.3"])):
        command = [sys.executable, "-c", WATCH.format(root=str(ROOT)), "convert", str(source), "-o", str(target)]
        done = subprocess.run([*command, "--overwrite", *extra], capture_output=True, text=True, check=True, cwd=folder)
        peaks[name] = round(int(done.stderr.split("peak ")[1]) * 1024 / 1e6)
    return peaks


def measure_inspect(folder: Path, rounds: int) -> list[dict[str, object]]:
    rows = []
    for title, extra, bound in (("inspect --header", ["--header"], 0.3), ("inspect", [], 5)):
        command = [sys.executable, "-X", "importtime", "-m", "i2l_ext", "inspect", str(folder / "rank48.safetensors")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}

        work = partial(
            subprocess.run, [command[0], *command[3:], *extra], env=environment, check=True, capture_output=True
        )
        imports = subprocess.run([*command, *extra], env=environment, check=True, capture_output=True, text=True).stderr
        best = min(seconds(work) for _ in range(rounds))
        torch_free = not any(line.rsplit("|", 1)[-1].strip() == "torch" for line in imports.splitlines())
        rows.append(
            {"work": f"{title} 708 MB", "ours s": round(best, 3), "without torch": torch_free, "bound": f"<= {bound} s"}
        )
    return rows


def peer() -> Callable | None:
    """`reset_lora_rank` of the installed `diffsynth` package, its file loaded alone; None where it is not installed."""
    spec = util.find_spec("diffsynth")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0]) / "utils" / "lora" / "reset_rank.py"
    module_spec = util.spec_from_file_location("peer_reset_rank", file)
    module = util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.reset_lora_rank


def measure_rank(sample: int | None) -> list[dict[str, object]]:
    rows = []
    theirs = peer()
    for before, after, bound in RESETS:
        lora = random_lora(before, "F32")
        pairs = {path: lora[path] for path in lora}
        memory = Lora.of(QWEN_IMAGE, pairs)
        resized = rank.resize(memory, after)
        resized[next(iter(pairs))]  # the first call sets up LAPACK
        made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        ours = min(seconds(partial(fetch, resized, made)) for _ in range(3))
        row: dict[str, object] = {"work": f"rank {before} -> {after}, 720 modules", "ours s": round(ours, 2)}
        row["error over optimum"] = f"{max(excess(pairs[p], made[p], after) for p in list(pairs)[::60]):.0e}"
        if theirs:
            shapes = defaultdict(list)
            for path in pairs:
                shapes[QWEN_IMAGE.modules[path].shape].append(path)
            total = 0.0
            for paths in shapes.values():
                chosen = paths if sample is None else paths[: max(1, math.ceil(sample / len(shapes)))]
                times = []
                for path in chosen:
                    down, up = pairs[path]
                    state = {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
                    times.append(seconds(partial(theirs, state, after)))
                total += sum(times) if sample is None else min(times) * len(paths)
            row["diffsynth s"] = f"{total:.1f}" + ("" if sample is None else f" (from {sample} modules)")
            row["times faster"] = round(total / ours, 1)
        rows.append({**row, "bound": f">= {bound}x, 1e-4"})
    return rows


BUSY = "import os\nos.sched_setaffinity(0, {0})\nwhile True: pass"
"""Takes one processor for itself. Where a process cannot be bound (macOS, Windows), the system places it."""


def measure_busy(folder: Path) -> list[dict[str, object]]:
    """The whole command `i2l rank`, while another process takes a processor."""
    source, target = folder / "rank20.safetensors", folder / "target.safetensors"
    random_lora(20).save(source, overwrite=True)
    command = [sys.executable, "-m", "i2l_ext", "rank", str(source), "--rank", "16", "-o", str(target), "--overwrite"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    work = partial(
        subprocess.run, command, env=environment | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True
    )
    busy = BUSY if hasattr(os, "sched_setaffinity") else "while True: pass"
    other = subprocess.Popen([sys.executable, "-c", busy])
    try:
        took = seconds(work)
    finally:
        other.kill()
        other.wait()
    return [{"work": "rank 20 -> 16 beside a busy process, 720 modules", "ours s": round(took, 2), "bound": "<= 8 s"}]


def fetch(lora: Lora, into: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    into.update({path: lora[path] for path in lora})


def excess(before: tuple, after: tuple, kept: int) -> float:
    """How far the error is above the optimum's, relative to the optimum or, where that is 0, to the update; float64."""
    (down, up), (small_down, small_up) = ((a.double(), b.double()) for a, b in (before, after))
    dense = up @ down
    error = float((small_up @ small_down - dense).norm())
    values = rank.svd_of_product(down, up, exact=True).s
    optimum = float(values[kept:].square().sum().sqrt())
    return (error - optimum) / (optimum or float(dense.norm()))


def measure_networks(folder: Path) -> list[dict[str, object]]:
    """`i2l convert --rank 16` of a LoKr of full rank, as a whole process."""
    source, target = folder / "lokr.safetensors", folder / "target.safetensors"
    generator = torch.Generator().manual_seed(0)
    plans = []
    for path in QWEN_IMAGE.i2l_modules:
        d_out, d_in = QWEN_IMAGE.modules[path].shape
        halves = {"lokr_w1": torch.randn(16, 16, generator=generator)}
        halves["lokr_w2"] = torch.randn(d_out // 16, d_in // 16, generator=generator)
        plans += [WritePlan.of(f"diffusion_model.{path}.{part}", half.bfloat16()) for part, half in halves.items()]
    with source.open("wb") as stream:
        write(stream, plans)
    command = [sys.executable, "-c", WATCH.format(root=str(ROOT)), "convert", str(source), "-o", str(target)]
    start = time.perf_counter()
    done = subprocess.run([*command, "--overwrite", "--rank", "16"], capture_output=True, text=True, check=True)
    row = {"work": f"LoKr of 720 modules, {source.stat().st_size / 1e6:.0f} MB, to rank 16"}
    row["ours s"] = round(time.perf_counter() - start, 1)
    row["peak anonymous memory, MB"] = round(int(done.stderr.split("peak ")[1]) * 1024 / 1e6)
    return [{**row, "bound": "<= 30 s, <= 1000 MB"}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmark")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", type=int, default=12, metavar="N", help="modules the peer is timed on")
    parser.add_argument("--full", action="store_true", help="time the peer on all 720 modules")
    parser.add_argument("--busy", action="store_true", help="only `i2l rank` beside a busy process")
    parser.add_argument("--networks", action="store_true", help="time a LoKr alone")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        if args.busy:
            rows = measure_busy(args.folder)
        elif args.networks:
            rows = measure_networks(args.folder)
        else:
            rows = measure_convert(args.folder, args.rounds) + measure_inspect(args.folder, args.rounds)
            rows += measure_rank(None if args.full else args.peer)
    finally:
        for size in (*(f"rank{size}" for size in SIZES), "lokr", "target"):
            (args.folder / f"{size}.safetensors").unlink(missing_ok=True)
    about = f"{os.cpu_count()} cores, torch {torch.__version__} on {torch.get_num_threads()} threads"
    if args.json:
        print(json.dumps({"machine": about, "rows": rows}))
    else:
        lines = [f"- {row.pop('work')}: " + ", ".join(f"{key} {value}" for key, value in row.items()) for row in rows]
        title = (
            "LoRA files beside a busy process" if args.busy else "Networks to LoRA" if args.networks else "LoRA files"
        )
        record(title, "\n".join(lines), script=__file__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
