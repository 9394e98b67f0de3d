"""A LoRA on the positive branch in the real ComfyUI: beside the layers, and by ComfyUI's own hooks.

    COMFYUI/python benchmarks/comfyui_branch.py COMFYUI_FOLDER [--family qwen-image|z-image] [--weights fp32|bf16|fp8]

With ComfyUI's own classes at real widths, one block (Z-Image: one layer and one of each refiner) of random weights, its
own sampling, cfg 4, on a processor. Prints seconds a step and whether both give the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

BLOCKS = ("transformer_blocks.0.", "layers.0.", "context_refiner.0.", "noise_refiner.0.")
Z_IMAGE = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 1,
    "n_refiner_layers": 1, "qk_norm": True, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
QWEN_IMAGE = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--family", choices=("qwen-image", "z-image"), default="qwen-image")
    parser.add_argument("--weights", choices=("fp32", "bf16", "fp8"), default="fp32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", type=int, default=32, help="of the latent")
    args = parser.parse_args()
    sys.argv = ["comfyui", "--cpu"]
    sys.path[:0] = [str(args.comfyui.resolve()), str(Path(__file__).resolve().parent.parent)]
    import comfy.options

    comfy.options.enable_args_parsing()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder) / "block.safetensors")


def compare(args: argparse.Namespace, file: Path) -> None:
    import comfy.hooks
    import comfy.utils
    import torch

    from i2l_ext.branch import Strength, adapter_of
    from i2l_ext.comfyui.load_node import on_branches
    from i2l_ext.converters import Lora, architectures

    is_z = args.family == "z-image"
    base = random_model(args, is_z)
    arch = architectures.Z_IMAGE if is_z else architectures.QWEN_IMAGE
    random = torch.Generator().manual_seed(1)
    factors = {}
    for path in (path for path in arch.i2l_modules if path.startswith(BLOCKS)):
        d_out, d_in = arch.modules[path].shape
        factors[path] = torch.randn(4, d_in, generator=random) * 0.05, torch.randn(d_out, 4, generator=random) * 0.05
    Lora.of(arch, factors).save(file)
    width = 2560 if is_z else 3584
    positive, negative = ([[torch.randn(1, 64, width, generator=random), {}]] for _ in range(2))
    tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
    hooked = comfy.hooks.set_hooks_for_conditioning(positive, comfy.hooks.create_hook_lora(tensors, 1.0, 0.0))
    beside = on_branches(base, [(file, Strength(1.0))])
    print(f"{args.family}, {args.weights}, {len(factors)} modules of rank 4")
    results = {}
    for name, model, prompt in (
        ("without", base, positive), ("beside the layers", beside, positive), ("by hooks", base, hooked),
        ("without again", base, positive),
    ):  # fmt: skip
        results[name], seconds = sample(model, prompt, negative, args)
        print(f"{name:18} {median(seconds[1:]):.2f} s a step (the first {seconds[0]:.2f} s)", flush=True)
    apart = (results["beside the layers"] - results["by hooks"]).abs().max()
    effect = (results["without"] - results["by hooks"]).abs().max()
    print(f"beside the layers and by hooks differ by {apart:.2g}; the effect is {effect:.2g}")
    print("bit-equal afterwards:", torch.equal(results["without"], results["without again"]))
    print(f"factors: {adapter_of(base.model.diffusion_model, [file]).nbytes / 1e6:.1f} MB")


def random_model(args: argparse.Namespace, is_z: bool) -> Any:
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[args.weights]
    config = comfy.supported_models.ZImage(Z_IMAGE) if is_z else comfy.supported_models.QwenImage(QWEN_IMAGE)
    config.set_inference_dtype(dtype, torch.bfloat16 if args.weights == "fp8" else None)
    model = config.get_model({})
    transformer = model.diffusion_model.to(dtype)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.copy_(torch.randn(weight.shape) * (0.02 if weight.ndim == 1 else weight.shape[-1] ** -0.5))
    processor = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, processor, processor)


def sample(model: Any, positive: Any, negative: Any, args: argparse.Namespace) -> tuple[Any, list[float]]:
    """The latent, and the seconds of each step."""
    import comfy.sample
    import torch

    moments = [time.perf_counter()]
    shape = (1, 16, args.side, args.side) if args.family == "z-image" else (1, 16, 1, args.side, args.side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        latent = comfy.sample.sample(
            model, noise, args.steps, 4.0, "euler", "simple", positive, negative, torch.zeros_like(noise), denoise=1.0,
            seed=3, callback=lambda *_: moments.append(time.perf_counter()), disable_pbar=True,
        )  # fmt: skip
    return latent, [after - before for before, after in pairwise(moments)]


if __name__ == "__main__":
    main()
