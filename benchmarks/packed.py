"""What packing does to the real models: bytes, time to read them, and how far embedding and update move.

    python benchmarks/packed.py --small                                   # a quarter of the width, all layers
    python benchmarks/packed.py --images 2 --dir /somewhere/with/room     # as published; 55 GB
    python benchmarks/packed.py --mini                                    # the style distance of the miniature

Random bfloat16 weights of the real shapes (DINOv3-7B, SigLIP2-G384 and the Style heads) are written to a file, packed
by ``PackWriter`` as ``i2l models pack`` does, and used by the same code as always. Errors are relative (Frobenius),
each against the unpacked weights computed in fp32:

- bf16: the unpacked weights, computed in bf16 as always; this much the arithmetic alone moves it;
- packed: the packed weights, computed in fp32; this much packing alone moves it;
- packed, bf16: both together, as a user has it.

Read: seconds to get every tensor from a cold disk as bf16, unpacking included, by the loader that encoders use.

Unpacked: numbers that one thread unpacks in a second of its processor, of a tensor in memory.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import out_of_cache, random_file  # before torch: how its threads wait

# isort: split
import torch
from torch import Tensor

from i2l_ext.converters.architectures import MINI
from i2l_ext.decoder import DecoderSpec
from i2l_ext.decoder.decode import Decoder
from i2l_ext.encoders import encoder_module
from i2l_ext.mini.evaluation import PROMPTS, Evaluator, spread, style_distances, unseen_pictures
from i2l_ext.mini.sampler import WEIGHTS
from i2l_ext.models.catalogue import DINOV3, SIGLIP2, STYLE, Checkpoint, find
from i2l_ext.operations.packing import relative_difference, update_difference
from i2l_ext.weights.compute import ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.pack_writer import PackWriter
from i2l_ext.weights.packed_numbers import pack, unpack
from i2l_ext.weights.packing import PACK_FORMATS, PackNote, packed_name
from i2l_ext.weights.stream import stream
from results import record, table

DTYPES = {"F32": "float32", "BF16": "bfloat16"}


def packed(path: Path, form: str) -> tuple[Path, float]:
    """The packed file, written where it is missing, and the seconds that took."""
    target = path.with_name(packed_name(path.name, form))
    start = time.perf_counter()
    if not target.exists():
        unfinished = target.with_suffix(".part")
        with path.open("rb") as source, unfinished.open("wb") as out:
            writer = PackWriter(out, path.stat().st_size, path.name, PackNote("random", path.name, form, "0" * 64))
            while piece := source.read(8 << 20):
                writer.write(piece)
            writer.finish()
        unfinished.rename(target)
    return target, time.perf_counter() - start


def read_seconds(path: Path, rounds: int) -> float:
    """The least of some rounds to have every tensor once as bf16, a hundred megabytes at a time."""
    times: list[float] = []
    with TensorFiles([path]) as files:
        groups: list[dict[str, str]] = []
        size = 0
        for key, shape in files.shapes.items():
            if not groups or size > 50_000_000:
                groups.append({})
                size = 0
            groups[-1][key] = key
            size += torch.Size(shape).numel()
        for _ in range(rounds):
            out_of_cache([path])
            start = time.perf_counter()
            with closing(stream(files, groups, ComputeOptions())) as tensors:
                for _ in tensors:
                    pass
            times.append(time.perf_counter() - start)
    return min(times)


def speed(form: str, dtype: str, rounds: int) -> str:
    """The most of some rounds, in thousands of millions of numbers."""
    shape = (2048, 4096)
    numbers, least = math.prod(shape), math.inf
    parts = pack((torch.randn(shape) / 64).bfloat16().view(-1), form)
    packed, scales = parts[0], torch.cat([part.view(torch.uint8) for part in parts[1:]])
    scales = scales if len(parts[2]) else scales.view(torch.bfloat16)
    out, threads = torch.empty(numbers, dtype=getattr(torch, dtype)), torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(3 * rounds):
        start = time.thread_time()
        unpack(packed, scales, PACK_FORMATS[form].group, 0, out)
        least = min(least, time.thread_time() - start)
    torch.set_num_threads(threads)
    return f"{numbers / least / 1e9:.2f}"


def embeddings(parts: Sequence[Checkpoint], files: Mapping[str, Path], dtype: str, images: int) -> list[Tensor]:
    """Of each encoder [images, width], of random pictures."""
    found: list[Tensor] = []
    for part in parts:
        pixels = torch.randn(images, 3, part.spec.image, part.spec.image, generator=torch.Generator().manual_seed(1))
        module, options = encoder_module(part.kind), ComputeOptions(dtype=DTYPES[dtype])
        found += module.encode([files[part.id]], part.spec, [pixels], options)
    return found


def narrow(dims: Any) -> Any:
    """The same encoder at a quarter of its width, on pictures of half the side."""
    return replace(dims, hidden=dims.hidden // 4, heads=dims.heads // 4, mlp=dims.mlp // 4, image=dims.image // 2)


def report(title: str, errors: Mapping[str, Sequence[float]], heads: Sequence[str]) -> str:
    return f"{title}\n\n" + table(
        ["", *heads], [[name, *(f"{100 * one:.2f} %" for one in row)] for name, row in errors.items()]
    )


def miniature(forms: Sequence[str], folder: Path) -> None:
    """How far images of 16 pictures' LoRAs are from the pictures' styles, with weights as shipped and packed."""
    pictures = [group[0] for group in unseen_pictures(16, 1)]
    found: dict[str, Tensor] = {}
    for form in ("", *forms):
        weights = shutil.copytree(WEIGHTS, folder / f"mini-{form}")
        for part in find("mini").parts if form else ():
            path = weights / Path(part.files[0]).name
            packed(path, form)[0].replace(path)
        evaluator = Evaluator(weights)
        loras = evaluator.make_loras("mini", pictures)
        found[form] = style_distances(torch.stack([evaluator.generate(PROMPTS, one) for one in loras]), pictures)
    rows = []
    for form, distances in found.items():
        moved = distances - found[""]
        rows.append([form or "as shipped", spread(distances), f"{moved.mean():+.4f}", f"{moved.abs().max():.4f}"])
    text = f"{len(pictures)} unseen pictures, {len(PROMPTS)} prompts each; mean ± standard deviation over pictures."
    head = ["weights", "style distance", "moved on average", "moved at most"]
    record("Packed weights, the miniature", f"{text}\n\n{table(head, rows)}", script=__file__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40, help="of each encoder (40 are all)")
    parser.add_argument("--small", action="store_true", help="a quarter of the width, and a small base model's heads")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2, help="of reading")
    parser.add_argument("--to", nargs="+", choices=PACK_FORMATS, default=list(PACK_FORMATS))
    parser.add_argument("--dir", type=Path, help="where to keep the files (12 GB for each form, and 21 GB unpacked)")
    parser.add_argument("--mini", action="store_true", help="the style distance of the miniature in place of all this")
    args = parser.parse_args()
    with ExitStack() as opened:
        folder = args.dir or Path(opened.enter_context(tempfile.TemporaryDirectory()))
        if args.mini:
            miniature(args.to, folder)
            return
        encoders = [replace(one, spec=replace(one.spec, layers=args.layers)) for one in (SIGLIP2, DINOV3)]
        style = STYLE
        if args.small:
            encoders = [replace(one, spec=narrow(one.spec)) for one in encoders]
            style = replace(STYLE, spec=DecoderSpec(MINI, sum(one.spec.hidden for one in encoders), compress=64))
        parts = [*encoders, style]
        plain = {part.id: folder / f"{part.id}-{args.layers}.safetensors" for part in parts}
        for part in parts:
            if not plain[part.id].exists():
                random_file(plain[part.id].with_suffix(".part"), part.shapes).rename(plain[part.id])
        sizes, forms = [], {}
        for form in args.to:
            made = {id: packed(path, form) for id, path in plain.items()}
            forms[form] = {id: path for id, (path, _) in made.items()}
            for id, (path, seconds) in made.items():
                whole, reading = plain[id].stat().st_size, read_seconds(plain[id], args.rounds)
                mine = read_seconds(path, args.rounds)
                sizes.append(
                    [
                        id,
                        form,
                        f"{whole / 1e9:.2f} GB",
                        f"{path.stat().st_size / 1e9:.2f} GB",
                        f"{seconds:.0f} s",
                        f"{reading:.1f} s",
                        f"{mine:.1f} s",
                        f"{mine / reading:.2f}",
                    ]
                )
                print(sizes[-1], flush=True)

        def made(files: Mapping[str, Path], dtype: str, form: str) -> tuple[list[Tensor], Decoder]:
            found = embeddings(encoders, files, dtype, args.images)
            print(form, dtype, "embedded", flush=True)
            return found, opened.enter_context(Decoder(files[style.id], style.spec, dtype=dtype))

        scales = [1 / args.images] * args.images
        exact, decoder = made(plain, "F32", "plain")
        truth = decoder.lora(torch.cat(exact, dim=-1), scales)
        errors = {}
        runs = [("bf16", plain, "BF16")]
        for form, files in forms.items():
            runs += [(f"{form}, packed", files, "F32"), (f"{form}, packed, bf16", files, "BF16")]
        for name, files, dtype in runs:
            found, heads = made(files, dtype, name)
            same = heads.lora(torch.cat(exact, dim=-1), scales)  # the heads alone
            both = heads.lora(torch.cat(found, dim=-1), scales)
            errors[name] = [
                *map(relative_difference, exact, found),
                relative_difference(torch.cat(exact, -1), torch.cat(found, -1)),
                update_difference([truth], [same]),
                update_difference([truth], [both]),
            ]
            print(name, errors[name], flush=True)
        speeds = [[form, *(speed(form, dtype, args.rounds) for dtype in DTYPES.values())] for form in args.to]
        text = table(["file", "form", "bf16", "packed", "to pack", "read bf16", "read packed", "ratio"], sizes)
        head = ["SigLIP2", "DINOv3", "embedding", "update, heads alone", "update"]
        width = "a quarter of the width" if args.small else "as published"
        title = f"Against fp32; {width}, {args.layers} layers, {args.images} pictures:"
        unpacked = table(
            ["unpacked, 10^9 numbers a second of a processor", *(f"to {one}" for one in DTYPES.values())], speeds
        )
        record("Packed weights", f"{text}\n\n{unpacked}\n\n{report(title, errors, head)}", script=__file__)


if __name__ == "__main__":
    main()
