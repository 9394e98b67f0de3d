"""Runs a template. Our own program never imports this: an installed DiffSynth-Studio's Python runs it as a script.

    python -I child.py FOLDER SCRATCH DEVICE MEMORY
    python -I child.py check

The second only imports what the first needs. The first reads SCRATCH/0.png, 1.png, ..., gives them to
DiffSynth-Studio's own TemplatePipeline with the template in FOLDER, and writes the LoRA to SCRATCH/lora.safetensors.
Until the template's code is loaded nothing of others has run; from then on nothing that this process says or writes is
believed.
"""

import contextlib
import importlib
import pathlib
import sys
from typing import Any

KEPT: list[object] = []
"""Declarations end with the object that made them."""


def set_bounds(memory: int) -> None:
    """Bounds that this process and its children cannot lift again. ``memory``: bytes of data."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return
    bounds = {"RLIMIT_DATA": memory, "RLIMIT_FSIZE": 8 << 30, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 512}
    for name, bound in bounds.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (bound, bound))


def declare_operators() -> None:
    """torchvision of the package registry does not import beside a torch without graphics card until these operators
    are known. Where they are, nothing happens."""
    import torch

    with contextlib.suppress(Exception):
        library = torch.library.Library("torchvision", "FRAGMENT")
        KEPT.append(library)
        for operator in ("nms(Tensor dets, Tensor scores, float threshold) -> Tensor", "qnms(Tensor a) -> Tensor"):
            with contextlib.suppress(RuntimeError):
                library.define(operator)


def import_diffsynth() -> list[Any]:
    """Its modules ``core`` and ``diffusion.template``."""
    declare_operators()
    return [importlib.import_module(f"diffsynth.{name}") for name in ("core", "diffusion.template")]


def main(folder: str, scratch: str, device: str, memory: str) -> None:
    """See above."""
    set_bounds(int(memory))
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    core, template = import_diffsynth()
    paths = sorted(pathlib.Path(scratch).glob("*.png"), key=lambda path: int(path.stem))
    pictures = [Image.open(path).convert("RGB") for path in paths]
    print("i2l: loading", flush=True)
    pipeline = template.TemplatePipeline.from_pretrained(
        torch_dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        device=device,
        model_configs=[core.ModelConfig(path=folder)],
    )
    print("i2l: computing", flush=True)
    with torch.no_grad():
        lora = pipeline.call_single_side(pipe=None, inputs=[{"image": pictures}])["lora"]
    tensors = {str(name): tensor.detach().cpu().contiguous().clone() for name, tensor in lora.items()}
    save_file(tensors, pathlib.Path(scratch, "lora.safetensors"))


if __name__ == "__main__":
    import_diffsynth() if sys.argv[1:] == ["check"] else main(*sys.argv[1:])
