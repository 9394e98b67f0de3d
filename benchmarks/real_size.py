"""``i2l make`` at full size, from weights on a cold disk to the file saved: time, memory and bytes read.

    python benchmarks/real_size.py --model qwen-image-style --images 1 2 4 5 8 16 --dir /somewhere/with/room --plot

Random weights of the real structure (the store checks the published hash) are written to ``--dir`` once and used
again; Style takes 21 GB, Coarse + Fine + Bias 63 GB, with ``--packed`` 12 and 38 GB, at no time more: they are packed
while they are made. For each number of pictures it is made three times: cold, with
the files put out of the page cache before; warm, right after; and anew with other weights of the pictures, from the
cache of embeddings. Beside the time stand two floors, measured in the same run: reading the bytes and letting them
go, in the faster of two ways, and the bare matrix products of the encoders' layers for as many pictures (DINOv3's
and SigLIP2's; Qwen-VL's are not counted), whole or in pieces, the fastest of before the cold run and after it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from bench import ROOT, linear_in_pieces, out_of_cache, random_file
from i2l_ext.converters.architectures import QWEN_IMAGE
from i2l_ext.converters.lora import Lora
from i2l_ext.encoders.dims import Dinov3Dims, SiglipDims
from i2l_ext.models import catalogue
from i2l_ext.models.catalogue import Checkpoint, I2LModel
from i2l_ext.models.pack import PACKED_KINDS
from i2l_ext.weights.devices import choose_dtype, device_facts
from i2l_ext.weights.packing import PACK_FORMATS, PackNote, packed_name
from results import record, table

SHARDS = 4
"""Files that the Qwen-VL text encoder comes in."""


def weights(model: I2LModel, folder: Path, form: str = "") -> list[Path]:
    """Every file of the model, written where it is missing; packed into a ``form``, as far as they are ever packed."""
    found: list[Path] = []
    for part in model.parts:
        home, packed = folder / str(part.repo), form if part.kind in PACKED_KINDS else ""
        [name] = part.files
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".index.json"):
            found += _sharded(part, home / name, packed)
        else:
            found.append(_write(part, home / name, part.shapes, packed))
    return found


def _write(part: Checkpoint, path: Path, shapes: Mapping[str, Sequence[int]], form: str) -> Path:
    note = PackNote(part.id, path.name, form, "") if form else None
    path = path.with_name(packed_name(path.name, form)) if form else path
    if path.exists():
        return path
    start = time.perf_counter()
    unfinished = path.with_suffix(".part")
    if part.kind == "bias":
        torch.manual_seed(0)
        pairs = {
            module: (torch.randn(2, m.shape[1]).bfloat16(), torch.randn(m.shape[0], 2).bfloat16() / 100)
            for module, m in QWEN_IMAGE.i2l_modules.items()
        }
        Lora.of(QWEN_IMAGE, pairs).save(unfinished, "diffsynth", overwrite=True)
    else:
        random_file(unfinished, shapes, note=note)
    unfinished.replace(path)
    size, seconds = path.stat().st_size / 1e9, time.perf_counter() - start
    print(f"{path.name}: {size:.1f} GB written in {seconds:.0f} s", file=sys.stderr)
    return path


def _sharded(part: Checkpoint, index: Path, form: str) -> list[Path]:
    keys = list(part.shapes)
    size = -(-len(keys) // SHARDS)
    paths = [index.with_name(f"model-{n + 1:05}-of-{SHARDS:05}.safetensors") for n in range(SHARDS)]
    owned = [{key: part.shapes[key] for key in keys[n * size : (n + 1) * size]} for n in range(SHARDS)]
    where = {key: path.name for path, own in zip(paths, owned, strict=True) for key in own}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return [_write(part, path, own, form) for path, own in zip(paths, owned, strict=True)]


def read_all(paths: list[Path]) -> float:
    """Seconds to read every byte from the disk: in order, or in two threads past the page cache if that is faster."""
    flags = [0, *([os.O_DIRECT] if hasattr(os, "O_DIRECT") else [])]
    return min(_read_all(paths, flag, threads) for threads, flag in enumerate(flags, 1))


def _read_all(paths: list[Path], flag: int, threads: int, piece: int = 16 << 20) -> float:
    out_of_cache(paths)
    start = time.perf_counter()
    for path in paths:
        number, offsets = os.open(path, os.O_RDONLY | flag), iter(range(0, path.stat().st_size, piece))

        def read(number: int = number, offsets: Iterator[int] = offsets) -> None:
            page_aligned = mmap.mmap(-1, piece)
            for offset in offsets:
                os.preadv(number, [page_aligned], offset)

        with ThreadPoolExecutor(threads) as pool:
            for job in [pool.submit(read) for _ in range(threads)]:
                job.result()
        os.close(number)
    return time.perf_counter() - start


@torch.no_grad()
def products(part: Checkpoint, images: int) -> tuple[float, float]:
    """Seconds, and those of the processors, for the matrix products of an encoder's layers in the dtype that `i2l make`
    computes it in, whole or in pieces, whichever is faster: of a fifth of them, times five, and two layers' weights
    stand for all."""
    dims = part.spec
    dtype = getattr(torch, choose_dtype(device_facts("cpu"), dims.safe_dtypes).dtype)
    assert isinstance(dims, SiglipDims | Dinov3Dims)
    gated = isinstance(dims, Dinov3Dims)
    wide, deep = (torch.randn(images * dims.tokens, n).to(dtype) for n in (dims.hidden, dims.mlp))
    shapes = [(dims.hidden, dims.hidden)] * 4 + [(dims.mlp, dims.hidden)] * (1 + gated) + [(dims.hidden, dims.mlp)]
    layers = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2)]

    def timed(linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> tuple[float, float]:
        for matrix in layers[0]:  # to warm up
            linear(wide if matrix.shape[1] == dims.hidden else deep, matrix)
        start, busy = time.perf_counter(), time.process_time()
        for number in range(dims.layers // 5):
            for matrix in layers[number % 2]:
                linear(wide if matrix.shape[1] == dims.hidden else deep, matrix)
        return 5 * (time.perf_counter() - start), 5 * (time.process_time() - busy)

    return min(timed(torch.nn.functional.linear), timed(linear_in_pieces))


def floor(model: I2LModel, images: int) -> tuple[float, float]:
    """The same for both encoders of pictures."""
    seconds, busy = zip(*(products(part, images) for part in (model.siglip2, model.dinov3)), strict=True)
    return sum(seconds), sum(busy)


@dataclass(frozen=True)
class Run:
    """What ``i2l make --json`` printed; seconds, and those of the processors; the peak of anonymous memory in GiB;
    GB read from the disk."""

    made: dict
    seconds: float
    busy: float
    peak: float
    read: float

    @property
    def phases(self) -> str:
        return f"{self.seconds:.1f} (" + ", ".join(f"{p} {s:.1f}" for p, s in self.made["seconds"].items()) + ")"


def make(model: str, folder: Path, pictures: list[Path], scratch: Path, *options: str, megabytes: float = 0) -> Run:
    """``megabytes``: read at so many a second at most."""
    program = [str(ROOT / "benchmarks" / "throttled.py"), str(megabytes)] if megabytes else ["-m", "i2l_ext"]
    command = [sys.executable, *program, "make", *map(str, pictures), "--name", "it", "--model", model,
               "--lora-dir", str(scratch / "out"), "--overwrite", "--json", *options]  # fmt: skip
    environment = {**os.environ, "I2L_MODELS": str(folder), "I2L_CACHE": str(scratch / "cache"),
                   "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}  # fmt: skip
    start, before, peak, read = time.perf_counter(), _busy(), 0, 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                counts = Path(f"/proc/{process.pid}/io").read_text()
            except (FileNotFoundError, ProcessLookupError):
                break
            peak = max(peak, _number(status, "RssAnon:"))
            read = max(read, _number(counts, "read_bytes:"))
            time.sleep(0.05)
        printed = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(process.returncode)
    return Run(json.loads(printed), time.perf_counter() - start, _busy() - before, peak / 2**20, read / 1e9)


def _busy() -> float:
    """Seconds of the processors for all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _number(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name)), 0)


def some_pictures(folder: Path, count: int) -> list[Path]:
    """So many PNG files in ``folder``, of 1200 x 1000 pixels, no two alike."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.effect_mandelbrot((1200, 1000), (-2, -1.2, 1, 1.2), 20 + number).convert("RGB").save(path)
    return paths


def plot(path: Path, counts: list[int], lines: Mapping[str, list[tuple[int, float]]]) -> None:
    """Seconds against pictures, both doubled from mark to mark."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for title, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "--" if "alone" in title else "-o", label=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, list(map(str, counts)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("pictures")
    axes.set_ylabel("seconds")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)


def report(args: argparse.Namespace, paths: list[Path], rows: list[list], anew: list[list]) -> None:
    """What is known so far."""
    size = sum(path.stat().st_size for path in paths) / 1e9
    load = f"Other work on the machine: a load of {os.getloadavg()[2]:.1f} on average in the last 15 minutes."
    head = ["pictures", "seconds", "reading alone", "products alone", "seconds / the larger", "processor seconds",
            "of products alone", "peak anonymous GiB", "GB from disk", "made"]  # fmt: skip
    text = f"{size:.1f} GB of weights, one run each. {load}\n\n{table(head, sorted(rows))}"
    if args.plot:
        text += "\n\n![Seconds against pictures, beside the floors](../docs/images/cost.png)"
    title = f"i2l make --model {args.model}" + (f", packed ({args.packed})" if args.packed else "")
    record(f"{title}, cold", text, script=__file__)
    if anew:
        head = ["pictures", "warm: seconds", "peak anonymous GiB", "GB from disk",
                "from the embeddings, other weights: seconds", "beyond decode", "processor seconds"]  # fmt: skip
        text = "The same right after, and from the cached embeddings with other weights and strength (median of 3).\n\n"
        record(f"{title}, again", text + table(head, sorted(anew)), script=__file__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen-image-style", choices=catalogue.MODELS)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--dir", type=Path, required=True, help="where the weights lie, or are to be written")
    parser.add_argument("--packed", choices=PACK_FORMATS, default="", help="of packed files")
    parser.add_argument("--again", type=int, nargs="*", help="how many pictures are made again, warm and from the "
                        "embeddings (default: all that --images has)")  # fmt: skip
    parser.add_argument("--cold-only", dest="again", action="store_const", const=[], help="nothing is made again")
    parser.add_argument("--plot", action="store_true", help="draw docs/images/cost.png")
    args = parser.parse_args()
    model = catalogue.find(args.model)
    paths = weights(model, args.dir, args.packed)
    disk = read_all(paths)
    rows, anew, lines = [], [], {"cold": [], "warm": [], "from the embeddings": [], "products alone": []}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pictures = some_pictures(scratch, max(args.images))
        for count in args.images:
            chosen = (args.model, args.dir, pictures[:count], scratch)
            before = floor(model, count)
            out_of_cache(paths)
            shutil.rmtree(scratch / "cache", ignore_errors=True)
            cold = make(*chosen)
            bare, busy = min(before, floor(model, count))
            row = [count, cold.phases, f"{disk:.1f}", f"{bare:.1f}", f"{cold.seconds / max(disk, bare):.2f}",
                   f"{cold.busy:.0f}", f"{busy:.0f}", f"{cold.peak:.2f}", f"{cold.read:.1f}"]  # fmt: skip
            lines["products alone"].append((count, bare))
            lines["cold"].append((count, cold.seconds))
            made = cold.made
            rows.append([*row, f"{made['modules']} of rank {made['rank']}, {made['bytes'] / 1e6:.0f} MB"])
            report(args, paths, rows, anew)
            if args.again is not None and count not in args.again:
                continue
            warm = make(*chosen, "--no-cache")
            again = [make(*chosen, "--weights", *map(str, range(1, count + 1)), "--strength", "0.5") for _ in range(3)]
            again.sort(key=lambda run: run.seconds)
            beyond = statistics.median(run.seconds - run.made["seconds"]["decode"] for run in again)
            anew.append([count, warm.phases, f"{warm.peak:.2f}", f"{warm.read:.1f}", again[1].phases, f"{beyond:.1f}",
                         f"{again[1].busy:.1f}"])  # fmt: skip
            lines["warm"].append((count, warm.seconds))
            lines["from the embeddings"].append((count, again[1].seconds))
            report(args, paths, rows, anew)
    if args.plot:
        lines["reading alone"] = [(count, disk) for count in args.images]
        plot(
            ROOT / "docs" / "images" / "cost.png",
            args.images,
            {title: points for title, points in lines.items() if points},
        )


if __name__ == "__main__":
    main()
