"""Many LoRAs by several processes: ``i2l make --each`` over noise pictures, one process killed half-way.

    python benchmarks/many.py --pictures 1000 --processes 2

The miniature makes them. Every process has its share, as under ``accelerate launch``. When half of the LoRAs are there,
the first process is killed; then the same command runs once more, alone, and makes what is missing. Beside the rate
stands that of the bare work: encoders and heads on as many pictures in one process, without files. The memory of each
process is looked at all the time; its slope over the second half is by least squares. At the end every picture has its
LoRA, whole.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import ROOT

# isort: split
import torch
from PIL import Image

from i2l_ext import images
from i2l_ext.batch import DECODED_TOGETHER, ENCODED_TOGETHER
from i2l_ext.converters.lora import Lora
from i2l_ext.decoder.decode import Decoder
from i2l_ext.embed import embed
from i2l_ext.models import catalogue, store
from results import record, table

MINI = "mini"


@dataclass
class Share:
    """A process, and its memory in MB at each look: (seconds, resident, anonymous)."""

    process: subprocess.Popen[bytes]
    looks: list[tuple[float, float, float]]

    def look(self, at: float) -> None:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return
        found = [re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE) for name in ("VmRSS", "RssAnon")]
        if all(found):
            self.looks.append((at, *(int(one[1]) / 1000 for one in found if one)))

    @property
    def slope(self) -> float:
        """MB of anonymous memory a minute, in the second half of its looks."""
        half = self.looks[len(self.looks) // 2 :]
        times, sizes = [at / 60 for at, *_ in half], [anonymous for *_, anonymous in half]
        middle, mean = sum(times) / len(times), sum(sizes) / len(sizes)
        spread = sum((at - middle) ** 2 for at in times)
        return (
            sum((at - middle) * (size - mean) for at, size in zip(times, sizes, strict=True)) / spread
            if spread
            else 0.0
        )


def start(folder: Path, lora: Path, rank: int, world: int) -> Share:
    words = [
        sys.executable,
        "-m",
        "i2l_ext",
        "make",
        "--each",
        folder,
        "--model",
        MINI,
        "--lora-dir",
        lora,
        "--no-cache",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": str(world),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    quiet = subprocess.DEVNULL
    return Share(subprocess.Popen(list(map(str, words)), env=environment, stdout=quiet, stderr=quiet), [])


def watched(shares: Sequence[Share], lora: Path, begun: float, until: int | None = None) -> None:
    """Look at the processes until all have ended, or ``until`` LoRAs are there."""
    while any(share.process.poll() is None for share in shares):
        for share in shares:
            share.look(time.monotonic() - begun)
        if until is not None and sum(1 for _ in lora.glob("*.safetensors")) >= until:
            return
        time.sleep(0.1)


@torch.no_grad()
def bare(paths: Sequence[Path]) -> float:
    """Seconds for encoders and heads alone, as many pictures together as ``--each`` takes."""
    model = catalogue.find(MINI)
    files = store.require(model)
    pictures = [images.open_image(path, sizes=model.views) for path in paths]
    begun = time.perf_counter()
    for first in range(0, len(pictures), ENCODED_TOGETHER):
        embeddings = embed(pictures[first : first + ENCODED_TOGETHER], model, files)
        count = len(embeddings.image)
        for at in range(0, count, DECODED_TOGETHER):
            rows = embeddings.rows(at, min(at + DECODED_TOGETHER, count)).image
            for expert in model.experts:
                with Decoder(files[expert.heads.id][0], expert.heads.spec) as decoder:
                    lora = decoder.lora(rows, [1.0] * len(rows))
                    assert all(lora[path] for path in lora)
    return time.perf_counter() - begun


def measure(folder: Path, pictures: int, processes: int) -> str:
    """The text of the section. AssertionError where a LoRA is missing, or not whole."""
    source, lora = folder / "pictures", folder / "Lora"
    source.mkdir()
    lora.mkdir()
    for number in range(pictures):
        Image.effect_noise((96, 64), 30 + number % 100).convert("RGB").save(source / f"{number:06}.png")
    few = sorted(source.iterdir())[: min(pictures, 2 * ENCODED_TOGETHER)]
    floor = bare(few) / len(few)
    begun = time.monotonic()
    shares = [start(source, lora, rank, processes) for rank in range(processes)]
    watched(shares, lora, begun, until=pictures // 2)
    half = time.monotonic() - begun
    shares[0].process.kill()
    shares[0].process.wait()
    watched(shares[1:], lora, begun)
    left = pictures - sum(1 for _ in lora.glob("*.safetensors"))
    again = start(source, lora, 0, 1)
    watched([again], lora, begun)
    assert again.process.returncode == 0
    made = sorted(path.stem for path in lora.glob("*.safetensors"))
    assert made == [f"{number:06}" for number in range(pictures)], "LoRAs are missing"
    assert all(len(Lora.read(lora / f"{name}.safetensors")) for name in made[:: max(pictures // 50, 1)])
    rows = [
        [
            title,
            f"{max(rss for _, rss, _ in one.looks):.0f}",
            f"{max(a for *_, a in one.looks):.0f}",
            f"{one.slope:+.1f}",
        ]
        for title, one in (*((f"share {n + 1}", share) for n, share in enumerate(shares)), ("once more", again))
        if one.looks
    ]
    rate = (pictures // 2) / half
    return (
        f"{pictures} pictures, the miniature, {processes} processes of one thread each. Until the first was killed, "
        f"half of the LoRAs took {half:.1f} s: {rate:.1f} a second, starts included. Encoders and heads alone, in one "
        f"process: {1 / floor:.1f} a second. The killed share left {left} LoRAs, which the same command made when it "
        "ran again; all were there, and whole.\n\n"
        + table(["process", "most resident, MB", "most anonymous, MB", "MB a minute, second half"], rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record("Many at once", measure(Path(folder), args.pictures, args.processes), script=__file__)


if __name__ == "__main__":
    main()
