"""How long ``i2l make`` goes on after it was told to stop, at many moments, and what memory it keeps.

    python benchmarks/cancel.py --model qwen-image-style --images 5 --dir /where/the/weights/lie

The weights are those of real_size.py. In each step the work is stopped at a random moment, three times; the time is
from the word to the end, when nothing of the file is left and the threads are gone. The bound is a second. Memory is
what is anonymous, before the first run and after the last. A machine that does other work makes the times longer.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import re
import statistics
import tempfile
import threading
import time
from pathlib import Path

import bench  # noqa: F401 - before torch: how its threads wait

# isort: split
import torch
from PIL import Image

from i2l_ext import library
from i2l_ext.converters.errors import Cancelled
from i2l_ext.models import catalogue
from i2l_ext.pipeline import make
from i2l_ext.requests import MakeRequest
from i2l_ext.weights.compute import DEFAULT_OPTIONS, Callbacks
from real_size import weights
from results import record, table


def anonymous() -> float:
    """GiB of this process."""
    return int(re.findall(r"^RssAnon:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[0]) / 2**20


def stopped(request: MakeRequest, step: str, share: float) -> float:
    """Seconds from the word, a little after ``share`` of the step is done, to the end."""
    word, told = threading.Event(), []

    def tell() -> None:
        told.append(time.perf_counter())
        word.set()

    begun, armed = [], []

    def progress(done: float) -> None:
        if begun[-1] == step and done >= share and not armed:
            armed.append(threading.Timer(random.uniform(0, 0.3), tell))
            armed[0].start()

    try:
        make(request, DEFAULT_OPTIONS, Callbacks(begun.append, progress, word.is_set))
    except Cancelled:
        took = time.perf_counter() - told[0]
    else:
        raise SystemExit(f"{step}: it was done before it was told to stop")
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("i2l-")]
    assert not left and not list(request.folder.rglob("*")), left
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen-image-style", choices=catalogue.MODELS)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, required=True)
    args = parser.parse_args()
    model = catalogue.find(args.model)
    weights(model, args.dir)
    os.environ["I2L_MODELS"] = str(args.dir)
    steps = [*(f"encode {part.id}" for part in (model.siglip2, model.dinov3, model.qwen_vl) if part), "decode"]
    rows, before = [], anonymous()
    with tempfile.TemporaryDirectory() as scratch:
        pictures = []
        for number in range(args.images):
            pictures.append(Path(scratch) / f"{number}.png")
            Image.effect_mandelbrot((1200, 1000), (-2, -1.2, 1, 1.2), 20 + number).convert("RGB").save(pictures[-1])
        request = MakeRequest(tuple(pictures), "it", Path(scratch) / "out", args.model)
        library.check_folder(request.folder)
        for step in steps:
            times = [stopped(request, step, random.uniform(0.05, 0.2)) for _ in range(args.rounds)]
            rows.append([step, f"{statistics.median(times):.2f}", f"{max(times):.2f}"])
            print(*rows[-1], flush=True)
    gc.collect()
    text = (
        f"{args.images} pictures, {args.rounds} rounds, {torch.get_num_threads()} threads. Anonymous memory: "
        f"{before:.2f} GiB before the first, {anonymous():.2f} after the last.\n\n"
    )
    record(f"Cancel, {args.model}", text + table(["stopped in", "median s", "most"], rows), script=__file__)


if __name__ == "__main__":
    main()
