"""A LoRA on one branch against DiffSynth's own: python benchmarks/branch_diffsynth.py, where diffsynth can be imported.

Its pipeline for Z-Image takes `positive_only_lora` and `negative_only_lora`. Its guided prediction, by its own code on
its own transformer at a small size and with random weights, is compared with ours on the same weights. Printed: the
largest difference over the largest number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import torch  # noqa: E402

library = torch.library.Library("torchvision", "FRAGMENT")  # torchvision's operators are not built for a CPU's torch
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from diffsynth.models.z_image_dit import ZImageDiT  # noqa: E402
from diffsynth.pipelines.z_image import ZImagePipeline  # noqa: E402

from branch_models import TINY_Z, known, lora_of  # noqa: E402
from i2l_ext.branch import BranchAdapter, Strength  # noqa: E402
from i2l_ext.converters import Lora  # noqa: E402

CFG = 4.0


def pipeline(dtype: torch.dtype) -> ZImagePipeline:
    """DiffSynth's pipeline with its transformer at TINY_Z's size, which takes LoRAs as these arguments need."""
    pipe = ZImagePipeline(device="cpu", torch_dtype=dtype)
    torch.manual_seed(0)
    pipe.dit = ZImageDiT(
        dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[32, 48, 48]
    )
    for parameter in pipe.dit.parameters():
        torch.nn.init.normal_(parameter.data, std=0.08) if parameter.ndim == 2 else parameter.data.fill_(1)
    pipe.dit.t_embedder.mlp.register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))  # it casts to bf16 always
    pipe.dit = pipe.enable_lora_hot_loading(pipe.dit.to(dtype).eval())
    return pipe


def predict(pipe: ZImagePipeline, model_fn: Callable[..., torch.Tensor], **loras: Any) -> torch.Tensor:
    """The guided prediction, by DiffSynth's own function for a step."""
    generator = torch.Generator().manual_seed(1)
    dtype = pipe.torch_dtype
    shared = {"latents": torch.randn(1, 16, 16, 16, generator=generator).to(dtype), **loras}
    texts = [{"prompt_embeds": [torch.randn(n, 32, generator=generator).to(dtype)]} for n in (9, 5)]
    timestep = torch.tensor([700.0], dtype=dtype)
    with torch.no_grad():
        return pipe.cfg_guided_model_fn(model_fn, CFG, shared, *texts, dit=pipe.dit, timestep=timestep)


def state_dict(lora: Lora) -> dict[str, torch.Tensor]:
    """As its i2L models give it."""
    named = {}
    for path in lora:
        down, up = lora[path]
        named |= {f"{path}.lora_A.default.weight": down, f"{path}.lora_B.default.weight": up}
    return named


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def switching(adapter: BranchAdapter, strengths: tuple[Strength, ...], model_fn: Callable[..., Any]) -> Any:
    """``model_fn`` with our terms. DiffSynth calls it for the positive branch first, then for the negative one."""
    branches = iter([True, False])

    def call(**kwargs: Any) -> torch.Tensor:
        with adapter.active(strengths, [next(branches)]):
            return model_fn(**kwargs)

    return call


def compare(dtype: torch.dtype) -> None:
    pipe = pipeline(dtype)
    style, grey = lora_of(TINY_Z, dtype=dtype), lora_of(TINY_Z, rank=2, seed=2, dtype=dtype)
    adapter = BranchAdapter(pipe.dit, [style, grey])
    positive, negative = {"positive_only_lora": state_dict(style)}, {"negative_only_lora": state_dict(grey)}
    none, own, other = Strength(0.0, 0.0), Strength(), Strength(0.0, 1.0)
    cases = (((own, none), positive), ((none, other), negative), ((own, other), {**positive, **negative}))
    for strengths, loras in cases:
        plain = predict(pipe, pipe.model_fn)
        theirs = predict(pipe, pipe.model_fn, **loras)
        ours = predict(pipe, switching(adapter, strengths, pipe.model_fn))
        print(
            f"{str(dtype)[6:]}, {' and '.join(loras)}: {difference(ours, theirs):.1e}; the LoRAs change the prediction "
            f"by {difference(theirs, plain):.2f}; afterwards bit-equal to before: "
            f"{torch.equal(predict(pipe, pipe.model_fn), plain)}"
        )


if __name__ == "__main__":
    print(f"diffsynth {version('diffsynth')}, torch {torch.__version__}")
    with known(TINY_Z):
        for number_format in (torch.float32, torch.bfloat16):
            compare(number_format)
