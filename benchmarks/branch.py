"""What a LoRA on one branch costs: python benchmarks/branch.py. Bounds: a step with a LoRA of rank 20 takes at most
1.06 of one without; 720 modules are loaded, and removed, in under a second; the memory is that of the factors.

The step: two blocks of diffusers' Qwen-Image class at its real widths, random weights, a batch of both branches. Steps
with and without take turns; the ratio is that of the medians of their processor seconds, so that other work on the
machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import bench  # noqa: F401 - before torch: how its threads wait

# isort: split
import torch
from diffusers import QwenImageTransformer2DModel

from i2l_ext.branch import BranchAdapter, Strength, adapter_of, forget_adapter
from i2l_ext.converters import Lora
from i2l_ext.converters.architectures import QWEN_IMAGE

MOST_OF_A_STEP, MOST_SECONDS = 1.06, 1.0


def lora(rank: int, blocks: int, dtype: torch.dtype) -> Lora:
    paths = [path for path, module in QWEN_IMAGE.i2l_modules.items() if (module.block or 0) < blocks]
    shapes = {path: QWEN_IMAGE.modules[path].shape for path in paths}
    return Lora.of(
        QWEN_IMAGE,
        {
            path: ((torch.randn(rank, d_in) / 50).to(dtype), (torch.randn(d_out, rank) / 50).to(dtype))
            for path, (d_out, d_in) in shapes.items()
        },
    )


def seconds_of(device: str) -> float:
    """A clock: of the processors; of the wall for another device, once it is done with what it was given."""
    if device == "cpu":
        return time.process_time()
    torch.get_device_module(device).synchronize()
    return time.perf_counter()


def step_ratio(
    side: int, tokens: int, turns: int, dtype: torch.dtype, device: str = "cpu", **sizes: int
) -> tuple[float, float, float, int]:
    """Ratio of the medians, both medians in seconds (see ``seconds_of``), bytes of the factors. ``sizes``: those of
    diffusers' class, where they are not Qwen-Image's."""
    model = QwenImageTransformer2DModel(num_layers=2, **sizes).to(device, dtype).eval().requires_grad_(False)
    pixels = side * side
    inputs = {
        "hidden_states": torch.randn(2, pixels, 64, dtype=dtype), "timestep": torch.tensor([0.5, 0.5], dtype=dtype),
        "encoder_hidden_states": torch.randn(2, tokens, 3584, dtype=dtype),
        "encoder_hidden_states_mask": torch.ones(2, tokens, dtype=torch.bool),
        "img_shapes": [[(1, side, side)]] * 2, "return_dict": False,
    }  # fmt: skip
    inputs = {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}
    adapter = BranchAdapter(model, [lora(20, 2, dtype)])
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with torch.inference_mode():
        for turn in range(2 * turns + 2):
            begun = seconds_of(device)
            if turn % 2:
                with adapter.active([Strength()], [True, False]):
                    model(**inputs)
            else:
                model(**inputs)
            if turn > 1:
                seconds[bool(turn % 2)].append(seconds_of(device) - begun)
    without, with_it = (statistics.median(seconds[with_it]) for with_it in (False, True))
    return with_it / without, without, with_it, adapter.nbytes


def load_and_remove(rank: int) -> tuple[float, float, int, int]:
    """Seconds to load 720 modules from a file in the page cache, and to remove them; bytes in memory, in the file."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "style.safetensors"
        lora(rank, 60, torch.bfloat16).save(file)
        size = file.stat().st_size
        loads, removals = [], []
        for _ in range(5):
            begun = time.perf_counter()
            adapter = adapter_of(model, [file])
            adapter.switch_on([Strength()], [True, False])
            loads.append(time.perf_counter() - begun)
            nbytes = adapter.nbytes
            del adapter
            begun = time.perf_counter()
            forget_adapter(model)
            removals.append(time.perf_counter() - begun)
    return statistics.median(loads), statistics.median(removals), nbytes, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=16, help="tokens along a side of the picture: 64 for 1024 pixels")
    parser.add_argument("--tokens", type=int, default=32, help="of a prompt")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    ratio, without, with_it, nbytes = step_ratio(args.side, args.tokens, args.turns, getattr(torch, args.dtype))
    print(
        f"a step of two blocks, {args.side}x{args.side} + {args.tokens} tokens, {args.dtype}: {without:.2f} s without, "
        f"{with_it:.2f} s with rank 20 on one branch: {ratio:.3f} (bound {MOST_OF_A_STEP}); "
        f"factors {nbytes / 1e6:.1f} MB"
    )
    load, removal, nbytes, size = load_and_remove(4)
    print(
        f"720 modules of rank 4: loaded in {load:.2f} s, removed in {removal:.2f} s (bound {MOST_SECONDS:g} s); "
        f"{nbytes / 1e6:.1f} MB in memory, {size / 1e6:.1f} MB in the file"
    )
    if ratio > MOST_OF_A_STEP or max(load, removal) > MOST_SECONDS:
        raise SystemExit("worse than its bound")


if __name__ == "__main__":
    main()
