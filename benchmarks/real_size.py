"""``i2l make`` at full size, from weights on a cold disk to the file saved: time, memory and bytes read.

    python benchmarks/real_size.py --model qwen-image-style --images 1 5 --dir /somewhere/with/room

Random weights of the real structure (the store checks the published hash) are written to ``--dir`` once and used
again; Style takes 21 GB, Coarse + Fine + Bias 63 GB. Before each run the files are put out of the page cache. Beside
the time stand two floors, measured in the same run: reading the bytes in order and letting them go, and the bare
matrix products of the encoders' layers for as many pictures (DINOv3's and SigLIP2's; Qwen-VL's are not counted).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from bench import ROOT, random_file, record, table
from i2l_ext.checkpoints import catalogue
from i2l_ext.checkpoints.catalogue import Checkpoint, Model
from i2l_ext.converters.architectures import QWEN_IMAGE
from i2l_ext.converters.lora import Lora
from i2l_ext.encoders.dims import Dinov3Dims, SiglipDims

SHARDS = 4
"""Files that the Qwen-VL text encoder comes in."""


def weights(model: Model, folder: Path) -> list[Path]:
    """Every file of the model, written where it is missing."""
    found: list[Path] = []
    for part in model.parts:
        home = folder / str(part.repo)
        [name] = part.files
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".index.json"):
            found += _sharded(part, home / name)
        else:
            if not (home / name).exists():
                _write(part, home / name)
            found.append(home / name)
    return found


def _write(part: Checkpoint, path: Path) -> None:
    print(f"writing {path.name} ({part.nbytes / 1e9:.1f} GB)", file=sys.stderr)
    unfinished = path.with_suffix(".part")
    if part.kind == "bias":
        torch.manual_seed(0)
        pairs = {
            module: (torch.randn(2, m.shape[1]).bfloat16(), torch.randn(m.shape[0], 2).bfloat16() / 100)
            for module, m in QWEN_IMAGE.made.items()
        }
        Lora.of(QWEN_IMAGE, pairs).save(unfinished, "diffsynth", overwrite=True)
    else:
        random_file(unfinished, part.shapes)
    unfinished.replace(path)


def _sharded(part: Checkpoint, index: Path) -> list[Path]:
    keys = list(part.shapes)
    size = -(-len(keys) // SHARDS)
    paths = [index.with_name(f"model-{n + 1:05}-of-{SHARDS:05}.safetensors") for n in range(SHARDS)]
    where = {}
    for number, path in enumerate(paths):
        own = {key: part.shapes[key] for key in keys[number * size : (number + 1) * size]}
        where |= dict.fromkeys(own, path.name)
        if not path.exists():
            random_file(path.with_suffix(".part"), own).rename(path)
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return paths


def out_of_cache(paths: list[Path]) -> None:
    """Have the next read come from the disk."""
    os.sync()
    for path in paths:
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(paths: list[Path]) -> float:
    """Seconds to read every byte from the disk, in order."""
    out_of_cache(paths)
    buffer = bytearray(16 << 20)
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


@torch.no_grad()
def products(part: Checkpoint, images: int) -> float:
    """Seconds for the matrix products of an encoder's layers; two layers' weights stand for all."""
    dims = part.spec
    assert isinstance(dims, SiglipDims | Dinov3Dims)
    gated = isinstance(dims, Dinov3Dims)
    wide, deep = (torch.randn(images * dims.tokens, n).bfloat16() for n in (dims.hidden, dims.mlp))
    shapes = [(dims.hidden, dims.hidden)] * 4 + [(dims.mlp, dims.hidden)] * (1 + gated) + [(dims.hidden, dims.mlp)]
    layers = [[torch.randn(shape).bfloat16() for shape in shapes] for _ in range(2)]
    start = time.perf_counter()
    for number in range(dims.layers):
        for matrix in layers[number % 2]:
            torch.nn.functional.linear(wide if matrix.shape[1] == dims.hidden else deep, matrix)
    return time.perf_counter() - start


def make(model: str, folder: Path, pictures: list[Path], out: Path) -> tuple[dict, float, float, float]:
    """What ``i2l make --json`` prints; seconds; the peak of anonymous memory in GiB; GB read from the disk."""
    command = [sys.executable, "-m", "i2l_ext", "make", *map(str, pictures), "--name", "it", "--model", model,
               "--lora-dir", str(out), "--overwrite", "--no-cache", "--json"]  # fmt: skip
    environment = {**os.environ, "I2L_MODELS": str(folder), "PYTHONPATH": str(ROOT)}
    start, peak, read = time.perf_counter(), 0, 0
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
    return json.loads(printed), time.perf_counter() - start, peak / 2**20, read / 1e9


def _number(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name)), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen-image-style", choices=catalogue.MODELS)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--dir", type=Path, required=True, help="where the weights lie, or are to be written")
    args = parser.parse_args()
    model = catalogue.find(args.model)
    paths = weights(model, args.dir)
    disk = read_all(paths)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        pictures = []
        for number in range(max(args.images)):
            pictures.append(Path(scratch) / f"{number}.png")
            Image.effect_mandelbrot((1200, 1000), (-2, -1.2, 1, 1.2), 20 + number).convert("RGB").save(pictures[-1])
        for count in args.images:
            bare = products(model.siglip2, count) + products(model.dinov3, count)
            out_of_cache(paths)
            made, seconds, peak, read = make(args.model, args.dir, pictures[:count], Path(scratch) / "out")
            phases = ", ".join(f"{phase} {took:.0f}" for phase, took in made["seconds"].items())
            rows.append([count, f"{seconds:.0f} ({phases})", f"{disk:.0f}", f"{bare:.0f}",
                         f"{seconds / max(disk, bare):.2f}", f"{peak:.2f}", f"{read:.1f}",
                         f"{made['modules']} of rank {made['rank']}, {made['bytes'] / 1e6:.0f} MB"])  # fmt: skip
    size = sum(path.stat().st_size for path in paths) / 1e9
    head = ["pictures", "seconds", "reading alone", "products alone", "seconds / the larger", "peak anonymous GiB",
            "GB from disk", "made"]  # fmt: skip
    record(f"i2l make --model {args.model}, cold", f"{size:.1f} GB of weights, one run each.\n\n{table(head, rows)}",
           script=__file__)  # fmt: skip


if __name__ == "__main__":
    main()
