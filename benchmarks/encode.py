"""How long DINOv3-7B takes over some pictures: ours, the authors' package, and the bare matrix products.

    python benchmarks/encode.py --layers 40 --images 5 --threads 2

Random bfloat16 weights of the real shapes, written to a file first, which is put out of the page cache before each
job. On the CPU, in bfloat16 but for one, all in turns, so that a busy machine is busy for all:

- ours: from the file to embeddings, everything included, as ``i2l make`` does it where the processor has AVX-512;
- ours, in fp32: the same as it does it elsewhere;
- reference, in memory: the authors' class with its weights loaded beforehand, picture by picture as their pipeline;
- reference, from disk: the same, from the file on, under their disk offload (their low-memory example). It maps the
  file, and for each picture reads anew what has not stayed in the page cache; as the reference in memory takes its
  share, that is less than on a machine of its own (``--skip memory``);
- matrix products: those of the layers alone, for all pictures at once, one layer's weights used again and again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import in_turns, linear_in_pieces, out_of_cache, random_file, usual  # before torch: how its threads wait

# isort: split
import torch
from torch import Tensor, nn

from i2l_ext.encoders import dinov3
from i2l_ext.encoders.dims import DINOV3_7B, Dinov3Dims
from i2l_ext.weights.compute import DEFAULT_OPTIONS
from peers import diffsynth
from results import record, table


def reference(dims: Dinov3Dims, path: Path, offload: bool) -> nn.Module:
    """The authors' class with the weights of ``path``, by their loader, with or without their disk offload."""
    import transformers
    from transformers.models.dinov3_vit import modeling_dinov3_vit as modeling

    plain = modeling.DINOv3ViTConfig
    transformers.DINOv3ViTImageProcessor = lambda **_: lambda images, **_: {"pixel_values": images}  # needs torchvision
    diffsynth("core.device")  # alone: the start of ``core`` imports what is not needed here
    module, loader = diffsynth("models.dinov3_image_encoder"), diffsynth("core.loader.model")
    convert = diffsynth("utils.state_dict_converters.dino_v3").DINOv3StateDictConverter
    modeling.DINOv3ViTConfig = lambda **kw: plain(**{**kw, "num_hidden_layers": dims.layers})
    try:
        settings = {"torch_dtype": torch.bfloat16, "device": "cpu", "state_dict_converter": convert}
        if not offload:
            model = loader.load_model(module.DINOv3ImageEncoder, str(path), **settings).eval()
            for weight in model.parameters():  # of what is mapped, only what fits the page cache is in memory
                weight.data = weight.data.clone()
            return model
        disk = {f"{state}_{what}": "disk" for state in ("offload", "onload") for what in ("dtype", "device")}
        compute = {f"{state}_dtype": torch.bfloat16 for state in ("preparing", "computation")}
        place = {f"{state}_device": "cpu" for state in ("preparing", "computation")}
        model = loader.load_model(
            module.DINOv3ImageEncoder,
            str(path),
            **settings,
            use_disk_map=True,
            module_map=wrappers(modeling),
            vram_config={**disk, **compute, **place},
            vram_limit=0,
        )
    finally:
        modeling.DINOv3ViTConfig = plain
    for part in model.modules():
        if hasattr(part, "onload"):
            part.check_free_vram = lambda: False  # on a CPU it cannot be asked
            part.onload()
    return model


def wrappers(modeling: Any) -> dict[type, type]:
    """The authors' table for this model, with classes for names."""
    layers = diffsynth("core.vram.layers")
    wrapped = (modeling.DINOv3ViTLayerScale, modeling.DINOv3ViTRopePositionEmbedding, modeling.DINOv3ViTEmbeddings,
               nn.Conv2d, nn.LayerNorm)  # fmt: skip
    return {**dict.fromkeys(wrapped, layers.AutoWrappedModule), nn.Linear: layers.AutoWrappedLinear}


@torch.no_grad()
def one_by_one(model: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([model(image, device="cpu") for image in pixels.split(1)])


def products(
    dims: Dinov3Dims, images: int, dtype: torch.dtype, linear: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], None]:
    """The matrix products of all layers; one layer's worth of memory is used throughout."""
    wide, deep = (torch.randn(images * dims.tokens, n).to(dtype) for n in (dims.hidden, dims.mlp))
    shapes = [(dims.hidden, dims.hidden)] * 4 + [(dims.mlp, dims.hidden)] * 2 + [(dims.hidden, dims.mlp)]
    matrices = [torch.randn(shape).to(dtype) for shape in shapes]

    def run() -> None:
        for _ in range(dims.layers):
            for matrix in matrices:
                linear(wide if matrix.shape[1] == dims.hidden else deep, matrix)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="layers of 40 (default 4: a gigabyte and a half)")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip", nargs="*", default=[], choices=["memory", "disk"], help="references to leave out")
    parser.add_argument("--dir", type=Path, help="where to write the weights (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dims = replace(DINOV3_7B, layers=args.layers)
    pixels = torch.randn(args.images, 3, dims.image, dims.image)
    in_fp32 = replace(DEFAULT_OPTIONS, dtype="float32")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path = Path(folder) / "model.safetensors"
        random_file(path, dinov3.structure(dims))
        jobs: dict[str, Callable[[], Tensor | None]] = {
            "ours": lambda: dinov3.encode([path], dims, [pixels], DEFAULT_OPTIONS)[0],
            "ours, in fp32": lambda: dinov3.encode([path], dims, [pixels], in_fp32)[0],
        }
        if "memory" not in args.skip:
            jobs["reference, in memory"] = usual(partial(one_by_one, reference(dims, path, offload=False), pixels))
        if "disk" not in args.skip:
            jobs["reference, from disk"] = usual(lambda: one_by_one(reference(dims, path, offload=True), pixels))
        for dtype, name in ((torch.bfloat16, ""), (torch.float32, ", in fp32")):
            jobs[f"matrix products{name}"] = products(dims, args.images, dtype, nn.functional.linear)
            jobs[f"matrix products{name}, in pieces"] = products(dims, args.images, dtype, linear_in_pieces)
        results: dict[str, Tensor] = {}

        def kept(title: str, job: Callable[[], Tensor | None]) -> None:
            if (result := job()) is not None:
                results[title] = result

        timed = {title: partial(kept, title, job) for title, job in jobs.items()}
        seconds = in_turns(timed, args.repeat, before=lambda: out_of_cache([path]))
    report(args, seconds, results)


def report(args: argparse.Namespace, seconds: dict[str, list[float]], results: dict[str, Tensor]) -> None:
    ours = statistics.median(seconds["ours"])
    rows = {
        title: {
            "median_s": round(statistics.median(times), 3),
            "min_s": round(min(times), 3),
            "max_s": round(max(times), 3),
            "over_ours": round(statistics.median(times) / ours, 3),
        }
        for title, times in seconds.items()
    }
    apart = {
        title: round(float((result.float() - results["ours"]).abs().max() / results["ours"].abs().max()), 4)
        for title, result in results.items()
    }
    if args.json:
        print(json.dumps({**vars(args), "dir": None, "seconds": rows, "difference_from_ours": apart}))
        return
    room = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    left = f"{int(room[1]) * 1024 / 1e9:.0f} GB" if room else "unknown"
    text = (
        f"{args.layers} of 40 layers, {args.images} pictures, bfloat16, {args.threads} threads, {args.repeat} rounds; "
        "ours and the reference from disk begin with nothing in the page cache, "
        f"for which {left} of memory are left.\n\n"
    )
    head = ["", "median s", "least", "most", "times ours", "differs from ours by"]
    lines = [[title, *row.values(), apart.get(title, "")] for title, row in rows.items()]
    alone = ", nothing else in memory" if "memory" in args.skip else ""
    record(f"DINOv3-7B on a CPU, {args.images} pictures{alone}", text + table(head, lines), script=__file__)


if __name__ == "__main__":
    main()
