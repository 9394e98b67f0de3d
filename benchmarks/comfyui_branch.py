"""A LoRA on the positive branch in the real ComfyUI: beside the layers, and by ComfyUI's own hooks.

    COMFYUI/python benchmarks/comfyui_branch.py COMFYUI_FOLDER [--family qwen-image|z-image|miniature]
        [--weights fp32|bf16|fp8|q8_0|q4_0]

With ComfyUI's own classes at real widths, one block (Z-Image: one layer and one of each refiner) of random weights, its
own sampling, cfg 4, on a processor. Prints seconds a step, the memory that each takes, and how far each is from the
exact prediction: the same weights, quantised as they are, in fp32 with the LoRA added in fp32. q8_0 and q4_0 are GGUF,
for Qwen-Image: they need the custom node ComfyUI-GGUF in custom_nodes and the package gguf.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
MINIATURE = QWEN_IMAGE | {
    "out_channels": 16, "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 3, "joint_attention_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
"""Qwen-Image's class with the miniature's layers: seconds, where real widths take minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--family", choices=("qwen-image", "z-image", "miniature"), default="qwen-image")
    parser.add_argument("--weights", choices=("fp32", "bf16", "fp8", "q8_0", "q4_0"), default="fp32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--modules", type=int, help="how many of the LoRA's modules; patching takes its time for each")
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
    is_small = args.family == "miniature"
    arch = (
        architectures.ARCHITECTURES["mini"] if is_small else architectures.Z_IMAGE if is_z else architectures.QWEN_IMAGE
    )
    random = torch.Generator().manual_seed(1)
    factors = {}
    for path in [path for path in arch.i2l_modules if is_small or path.startswith(BLOCKS)][: args.modules]:
        d_out, d_in = arch.modules[path].shape
        factors[path] = torch.randn(4, d_in, generator=random) * 0.05, torch.randn(d_out, 4, generator=random) * 0.05
    Lora.of(arch, factors).save(file)
    width = 32 if is_small else 2560 if is_z else 3584
    positive, negative = ([[torch.randn(1, 64, width, generator=random), {}]] for _ in range(2))
    tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
    hooked = comfy.hooks.set_hooks_for_conditioning(positive, comfy.hooks.create_hook_lora(tensors, 1.0, 0.0))
    beside = on_branches(base, [(file, Strength(1.0))])
    print(f"{args.family}, {args.weights}, {len(factors)} modules of rank 4")
    results = {}
    for name, model, prompt in (
        ("without", base, positive), ("beside the layers", beside, positive), ("without again", base, positive),
        ("by hooks", base, hooked), ("without at last", base, positive),
    ):  # fmt: skip
        try:
            with peak() as memory:
                results[name], seconds = sample(model, prompt, negative, args)
        except Exception as error:  # noqa: BLE001 - that is a result
            print(f"{name:18} fails: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        print(
            f"{name:18} {median(seconds[1:]):.2f} s a step (the first {seconds[0]:.2f} s), {memory[0] / 1e6:.0f} MB "
            "more than before it", flush=True,
        )  # fmt: skip
    for name in ("without again", "without at last"):
        if name in results:
            print(f"{name} is bit-equal to without: {torch.equal(results['without'], results[name])}")
    print(f"factors: {adapter_of(base.model.diffusion_model, [file]).nbytes / 1e6:.1f} MB")
    weights = plain_weights(base.model.diffusion_model)
    del base, beside
    args.weights = "fp32"
    exact = random_model(args, is_z)
    exact.model.diffusion_model.load_state_dict(weights)
    wanted, _ = sample(exact, hooked, negative, args)
    without, _ = sample(exact, positive, negative, args)
    effect = (wanted - without).abs().max()
    for name, found in results.items():
        expected = without if name.startswith("without") else wanted
        print(f"{name:18} is {(found - expected).abs().max() / effect:.1e} of the effect from the exact prediction")


@contextmanager
def peak() -> Iterator[list[int]]:
    """[the most bytes of memory beyond those at the beginning]."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before, most, over = resident(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], resident() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def plain_weights(transformer: Any) -> dict[str, Any]:
    """Its weights in fp32, as they are when they are computed with."""
    import torch

    def plain(weight: Any) -> Any:
        if hasattr(weight, "tensor_type"):
            dequantize = sys.modules["comfyui_gguf.dequant"].dequantize_tensor
            return torch.Tensor(dequantize(weight, torch.float32)).as_subclass(torch.Tensor)
        return weight.float()

    return {name: plain(weight).clone() for name, weight in transformer.state_dict(keep_vars=True).items()}


def random_gguf(args: argparse.Namespace, transformer: Any) -> Any:
    """The model of a GGUF file, as the custom node loads it."""
    import folder_paths
    import gguf
    import nodes  # noqa: F401 - the custom node wants ComfyUI's

    folder = args.comfyui.resolve() / "custom_nodes" / "ComfyUI-GGUF"
    places = {"submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location("comfyui_gguf", folder / "__init__.py", **places)
    module = sys.modules["comfyui_gguf"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind = getattr(gguf.GGMLQuantizationType, args.weights.upper())
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "base.gguf"
        writer = gguf.GGUFWriter(path, "qwen_image")
        for name, weight in transformer.state_dict().items():
            array = weight.float().numpy()
            is_large = weight.ndim == 2 and "blocks" in name
            chosen = kind if is_large else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(array, chosen), raw_dtype=chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        folder_paths.get_full_path = lambda kind, name: str(path)
        return module.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet("base.gguf")[0]


def random_model(args: argparse.Namespace, is_z: bool) -> Any:
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "fp8": torch.float8_e4m3fn}.get(args.weights, torch.bfloat16)
    sizes = MINIATURE if args.family == "miniature" else QWEN_IMAGE
    config = comfy.supported_models.ZImage(Z_IMAGE) if is_z else comfy.supported_models.QwenImage(sizes)
    config.set_inference_dtype(dtype, torch.bfloat16 if args.weights == "fp8" else None)
    model = config.get_model({})
    transformer = model.diffusion_model.to(dtype)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.copy_(torch.randn(weight.shape) * (0.02 if weight.ndim == 1 else weight.shape[-1] ** -0.5))
    if args.weights.startswith("q"):
        return random_gguf(args, transformer)
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
