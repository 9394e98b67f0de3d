"""What a graphics card makes of it, in one command of at most eight minutes, from a bare checkout.

    python benchmarks/gpu.py                        on the card that is there, Style at full size (21 GB are written)
    python benchmarks/gpu.py --layers 10            with a quarter of the encoders' layers and fewer heads
    python benchmarks/gpu.py --small --device cpu   the same at the size of tests, in seconds

Random weights of the real structure. Style's encoders with 1, 5 and 16 pictures, bound to ``--memory`` and unbound
(0.85 of what is free); the peaks of device and pinned memory; and the same by transformers' own classes, whose weights
are held on the card, or read from the file first. Then the heads, and what a LoRA on one branch adds to a step of
Qwen-Image. What does not fit into ``--seconds`` is left out, and said to be. Writes its section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import random_file  # before torch: how its threads wait

# isort: split
import torch
from torch import Tensor, nn

import branch
from i2l_ext.converters.architectures import MINI, QWEN_IMAGE
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import load_file
from i2l_ext.decoder import DecoderSpec
from i2l_ext.decoder.decode import Decoder
from i2l_ext.encoders import dinov3, siglip2
from i2l_ext.encoders.dims import DINOV3_7B, DINOV3_MINI, SIGLIP2_G384, SIGLIP2_MINI, Dinov3Dims, SiglipDims
from i2l_ext.encoders.keys import file_key
from i2l_ext.encoders.skeleton import build_without_weights
from i2l_ext.requests import parse_size
from i2l_ext.weights.compute import ComputeOptions
from i2l_ext.weights.devices import device_facts, resolve_device
from results import record, table

Dims = SiglipDims | Dinov3Dims


@dataclass(frozen=True)
class Subject:
    """What is measured: encoders by name with their sizes and file, the heads' spec and file."""

    encoders: dict[str, tuple[Dims, Path]]
    heads: DecoderSpec
    file: Path

    @staticmethod
    def written(folder: Path, small: bool, layers: int) -> Subject:
        """Of random weights, which are written here."""
        siglip, dino = (SIGLIP2_MINI, DINOV3_MINI) if small else (SIGLIP2_G384, DINOV3_7B)
        dims = {"siglip2": replace(siglip, layers=min(layers, siglip.layers)),
                "dinov3": replace(dino, layers=min(layers, dino.layers))}  # fmt: skip
        arch = MINI
        if not small:
            blocks = max(60 * layers // 40, 1)
            arch = replace(QWEN_IMAGE, stacks=tuple(replace(s, depth=min(blocks, s.depth)) for s in QWEN_IMAGE.stacks))
        heads = DecoderSpec(arch, sum(one.width for one in dims.values()), 8 if small else 64)
        encoders = {
            name: (one, random_file(folder / f"{name}.safetensors", MODULES[name].structure(one)))
            for name, one in dims.items()
        }
        return Subject(encoders, heads, random_file(folder / "heads.safetensors", heads.shapes))


MODULES: dict[str, Any] = {"siglip2": siglip2, "dinov3": dinov3}


class Card:
    """Clock and memory of a device."""

    def __init__(self, name: str) -> None:
        self.name, self.module = name, torch.get_device_module(name)

    def measure(self, job: Callable[[], Any]) -> tuple[Any, list[str]]:
        """What ``job`` gives; seconds, peak of the device's memory and of pinned memory, in GB."""
        cuda = self.name.startswith("cuda")
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.name)
            with suppress(AttributeError, RuntimeError):  # an older torch
                torch.cuda.reset_peak_host_memory_stats()
        self._wait()
        start = time.perf_counter()
        result = job()
        self._wait()
        seconds, device, pinned = time.perf_counter() - start, "", ""
        if cuda:
            device = f"{torch.cuda.max_memory_reserved(self.name) / 1e9:.2f}"
            with suppress(AttributeError, RuntimeError, KeyError):
                pinned = f"{torch.cuda.host_memory_stats()['allocated_bytes.peak'] / 1e9:.3f}"
        return result, [f"{seconds:.2f}", device, pinned]

    def _wait(self) -> None:
        if self.name != "cpu":
            self.module.synchronize()


def pixels(subject: Subject, count: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(count)
    return {
        name: torch.randn(count, 3, dims.image, dims.image, generator=random)
        for name, (dims, _) in subject.encoders.items()
    }


def ours(subject: Subject, pictures: dict[str, Tensor], options: ComputeOptions) -> Tensor:
    """Embeddings [N, width], from the files on."""
    parts = [
        MODULES[name].encode([path], dims, [pictures[name]], options)[0]
        for name, (dims, path) in subject.encoders.items()
    ]
    return torch.cat(parts, dim=-1)


class Reference:
    """transformers' own classes, with all their weights on the device."""

    def __init__(self, subject: Subject, device: str) -> None:
        self.device, self.models = device, {}
        for name, (dims, path) in subject.encoders.items():
            self.models[name] = self._loaded(name, dims, path)

    def _loaded(self, name: str, dims: Dims, path: Path) -> nn.Module:
        from transformers import DINOv3ViTModel, SiglipVisionModel

        kind = {"siglip2": SiglipVisionModel, "dinov3": DINOv3ViTModel}[name]
        model = build_without_weights(lambda: kind(MODULES[name].config(dims)))
        weights = load_file(path)
        model.load_state_dict({key: weights[file_key(name, key)] for key in model.state_dict()}, assign=True)
        return model.to(self.device, torch.bfloat16)

    @torch.no_grad()
    def __call__(self, pictures: dict[str, Tensor]) -> Tensor:
        """Embeddings [N, width], picture by picture."""
        parts = [
            torch.cat([model(one.to(self.device, torch.bfloat16)).pooler_output for one in pictures[name].split(1)])
            for name, model in self.models.items()
        ]
        return torch.cat(parts, dim=-1).float().cpu()


class Budget:
    """Seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self.end, self.left_out = time.monotonic() + seconds, []

    def allows(self, title: str) -> bool:
        if time.monotonic() < self.end:
            return True
        self.left_out.append(title)
        return False


def encoder_rows(
    subject: Subject, card: Card, counts: Sequence[int], bound: int, budget: Budget
) -> Iterator[list[str]]:
    """A row for each number of pictures and way of computing."""
    found: dict[int, Tensor] = {}
    for memory, title in ((None, "ours, unbound"), (bound, f"ours, --memory {bound / 1e9:g}GB")):
        options = ComputeOptions(card.name, "bfloat16", memory)
        for count in counts:
            if not budget.allows(f"{title}, {count} pictures"):
                continue
            try:
                result, measured = card.measure(
                    lambda count=count, options=options: ours(subject, pixels(subject, count), options)
                )
            except UserError as error:
                yield [str(count), title, str(error), "", "", ""]
                continue
            apart = _apart(result, found.setdefault(count, result))
            yield [str(count), title, *measured, apart]
    if not budget.allows("the reference"):
        return
    reference, loading = card.measure(lambda: Reference(subject, card.name))
    for count in counts:
        if not budget.allows(f"the reference, {count} pictures"):
            continue
        result, measured = card.measure(lambda count=count: reference(pixels(subject, count)))
        yield [str(count), "reference, held on the device", *measured, _apart(result, found[count])]
        total = float(loading[0]) + float(measured[0])
        yield [str(count), "reference, from the file", f"{total:.2f}", *measured[1:], ""]


def _apart(one: Tensor, other: Tensor) -> str:
    return f"{float((one - other).norm() / other.norm()):.1e}"


def decode_row(subject: Subject, count: int) -> list[str]:
    """Seconds for the heads, which are on the processor, for ``count`` pictures."""
    embeddings = torch.randn(count, subject.heads.embed)
    start = time.perf_counter()
    with Decoder(subject.file, subject.heads) as decoder:
        lora = decoder.lora(embeddings, [1 / count] * count)
        modules = len([lora[path] for path in lora])
    return [str(count), f"{modules}", f"{time.perf_counter() - start:.2f}"]


def branch_cost(device: str, small: bool) -> str:
    """What a LoRA on one branch adds to a step."""
    try:
        side, tokens, turns = (4, 8, 1) if small else (64, 64, 10)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        ratio, without, with_it, _ = branch.step_ratio(side, tokens, turns, dtype, device)
    except ImportError as error:
        return f"The branch hooks were not measured: {error}."
    return (
        f"A step of two blocks of Qwen-Image at {side} x {side} + {tokens} tokens: {without:.3f} s, and {with_it:.3f} "
        f"s with a LoRA of rank 20 on one branch: {ratio:.3f} times."
    )


def measure(folder: Path, device: str, counts: Sequence[int], *, layers: int = 40, small: bool = False,
            memory: int = 6 * 10**9, seconds: float = 400) -> str:  # fmt: skip
    """The text of the section."""
    budget, card = Budget(seconds), Card(device)
    start = time.monotonic()
    subject = Subject.written(folder, small, layers)
    wrote = time.monotonic() - start
    ours(subject, pixels(subject, 1), ComputeOptions(device, "bfloat16"))  # to warm up
    encoders = list(encoder_rows(subject, card, counts, memory, budget))
    heads = [decode_row(subject, count) for count in counts if budget.allows(f"decode, {count} pictures")]
    hooks = branch_cost(device, small) if budget.allows("the branch hooks") else ""
    size = "the size of tests" if small else f"{layers} of 40 layers"
    left = f"\n\nLeft out for want of time: {'; '.join(budget.left_out)}." if budget.left_out else ""
    return (
        f"On {device_facts(device)}, {size}; weights from files that were just written (in {wrote:.0f} s), so "
        "mostly from the page cache.\n\n"
        + table(["pictures", "encoders", "seconds", "device GB", "pinned GB", "from ours"], encoders)
        + "\n\n"
        + table(["pictures", "modules", "decode, seconds"], heads)
        + f"\n\n{hooks}{left}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 5, 16])
    parser.add_argument("--layers", type=int, default=40, help="of each encoder; heads in proportion")
    parser.add_argument("--memory", type=parse_size, default=6 * 10**9)
    parser.add_argument("--seconds", type=float, default=400, help="after which nothing more is begun")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--dir", type=Path, help="where to write the weights (default: a temporary folder)")
    args = parser.parse_args()
    device = resolve_device(args.device)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        text = measure(Path(folder), device, args.images, layers=args.layers, small=args.small, memory=args.memory,
                       seconds=args.seconds)  # fmt: skip
    title = "Style on a device, at the size of tests" if args.small else "Style on a graphics card"
    record(f"{title}: {device}", text, script=__file__)


if __name__ == "__main__":
    main()
