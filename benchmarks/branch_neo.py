"""A LoRA on one branch in Forge Neo's own sampling code and model classes.

    python branch_neo.py FOLDER [qwen] [z] [fp32] [bf16]

FOLDER is Forge Neo's; run it with Forge Neo's Python, and with this repository on PYTHONPATH. The models have real
widths, one block of each kind, and random weights. Each prediction is compared with two models: one into whose weights
Forge Neo's own loader has merged the LoRA, and one without. Printed: the largest difference over the largest number.
In bf16 both predictions with two LoRAs, ours and the merged model's, are compared with the exact one, too: the same
weights and factors merged and computed in fp32.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(sys.argv[1]).resolve()
FAMILIES = [word for word in sys.argv[2:] if word in ("qwen", "z")] or ["qwen", "z"]
FORMATS = [word for word in sys.argv[2:] if word in ("fp32", "bf16")] or ["fp32", "bf16"]
sys.argv = [sys.argv[0], "--cpu"]
os.chdir(FOLDER)
sys.path[:0] = [str(FOLDER), str(FOLDER / "modules_forge" / "packages")]

import torch  # noqa: E402
from backend.args import dynamic_args  # noqa: E402
from backend.modules.k_model import KModel  # noqa: E402
from backend.modules.k_prediction import PredictionDiscreteFlow  # noqa: E402
from backend.patcher.lora import load_lora, merge_lora_to_weight, model_lora_keys_unet  # noqa: E402
from backend.patcher.unet import UnetPatcher  # noqa: E402
from backend.sampling.condition import compile_conditions  # noqa: E402
from backend.sampling.sampling_function import calc_cond_uncond_batch  # noqa: E402
from huggingface_guess import model_list  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from i2l_ext import branch  # noqa: E402
from i2l_ext.converters import Lora  # noqa: E402
from i2l_ext.converters.architectures import QWEN_IMAGE, Z_IMAGE, Architecture  # noqa: E402

CASES = (("one batch", (8, 8), 1), ("two pictures", (8, 8), 2), ("separate calls", (7, 64), 1))
"""Name, tokens of the two prompts, pictures."""
Predictions = tuple[torch.Tensor, torch.Tensor]
"""Of the positive and of the negative branch."""


def qwen() -> tuple[torch.nn.Module, type, int]:
    from backend.nn.qwen import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(num_layers=1), model_list.QwenImage, 3584


def z_image() -> tuple[torch.nn.Module, type, int]:
    from backend.nn.lumina import NextDiT

    model = NextDiT(
        patch_size=2, in_channels=16, dim=3840, n_layers=1, n_refiner_layers=1, n_heads=30, n_kv_heads=30, qk_norm=True,
        cap_feat_dim=2560, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0,
        ffn_dim_multiplier=8.0 / 3.0, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
    )  # fmt: skip
    for parameter in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.normal_(parameter.data)
    return model, model_list.ZImage, 2560


def host_model(built: tuple[torch.nn.Module, type, int], dtype: torch.dtype) -> KModel:
    """As Forge Neo's loader leaves it: the model with its two dtypes, in a KModel."""
    model, guess, _ = built
    dynamic_args.ops = "none"
    model = model.to(dtype)
    model.storage_dtype = model.computation_dtype = dtype
    model.load_device = model.offload_device = model.initial_device = torch.device("cpu")
    model.config, config = {"n_layers": 1, "n_refiner_layers": 1, "dim": 3840}, guess({})
    return KModel(model=model, diffusers_scheduler=None, k_predictor=PredictionDiscreteFlow(config), config=config)


def merged(model: KModel, *weighted: tuple[Path, float]) -> KModel:
    """A copy into whose weights Forge Neo has merged LoRA files."""
    model = copy.deepcopy(model)
    weights = dict(model.named_parameters())
    for file, weight in weighted:
        found, rest = load_lora(load_file(file), model_lora_keys_unet(model, {}))
        assert not rest, f"{len(rest)} tensors unmatched"
        for key, patch in found.items():
            name, offset = (key, None) if isinstance(key, str) else key[:2]
            parameter = weights[name]
            new = merge_lora_to_weight([(weight, patch, 1.0, offset, None)], parameter.data.clone().float(), name)
            parameter.data.copy_(new)
    return model


def lora_file(arch: Architecture, folder: Path, name: str, seed: int, dtype: torch.dtype, rank: int = 20) -> Path:
    generator = torch.Generator().manual_seed(seed)
    paths = [path for path, module in arch.i2l_modules.items() if module.block == 0]

    def factor(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    shapes = {path: arch.modules[path].shape for path in paths}
    pairs = {path: (factor(rank, d_in), factor(d_out, rank)) for path, (d_out, d_in) in shapes.items()}
    Lora.of(arch, pairs).save(folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def predict(
    model: KModel, tokens: tuple[int, int], width: int, pictures: int, options: dict, *, both: bool = True
) -> Predictions:
    """Forge Neo's predictions of both branches."""
    generator = torch.Generator().manual_seed(1)
    frames = [1] if width == 3584 else []  # Qwen-Image's latents are those of a video model
    x = torch.randn(pictures, 16, *frames, 16, 16, generator=generator)
    texts = [torch.randn(pictures, count, width, generator=generator) for count in tokens]
    cond, uncond = (compile_conditions(text) for text in texts)
    sigma = torch.full((pictures,), 0.7)
    with torch.inference_mode():
        return calc_cond_uncond_batch(model, cond, uncond if both else None, x, sigma, {"transformer_options": options})


def exactly(model: KModel, loras: Sequence[tuple[Path, float]], width: int) -> list[Predictions]:
    """For each case the predictions of a model in fp32, into which LoRA files were merged in fp32."""
    exact = copy.deepcopy(model).float()
    for part in (exact, exact.diffusion_model):
        part.storage_dtype = part.computation_dtype = torch.float32
    exact = merged(exact, *loras)
    return [predict(exact, tokens, width, pictures, {}) for _, tokens, pictures in CASES]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def compare(name: str, dtype: torch.dtype) -> None:
    built, arch = (qwen(), QWEN_IMAGE) if name == "qwen" else (z_image(), Z_IMAGE)
    for parameter in built[0].parameters():
        torch.nn.init.normal_(parameter.data, std=0.02) if parameter.ndim == 2 else torch.nn.init.normal_(
            parameter.data, 1, 0.1
        )
    plain, width = host_model(built, dtype), built[2]
    patcher = UnetPatcher(plain, torch.device("cpu"), torch.device("cpu"))
    del built
    with tempfile.TemporaryDirectory() as folder:
        style = lora_file(arch, Path(folder), "style", 1, dtype)
        grey = lora_file(arch, Path(folder), "style-grey", 2, dtype, rank=4)
        positive, negative = [(style, 0.8)], [(style, -0.2), (grey, 0.5)]
        exact = [exactly(plain, loras, width) for loras in (positive, negative)] if dtype != torch.float32 else []
        with_style, with_grey = merged(plain, *positive), merged(plain, *negative)
        model = plain.diffusion_model
        # host's loader reads 60-block names; only block 0 is here, and so in the file
        for number, (case, tokens, pictures) in enumerate(CASES):
            expected = [predict(one, tokens, width, pictures, {}) for one in (with_style, with_grey)]
            before = predict(plain, tokens, width, pictures, {})
            branch.follow(model)
            adapter = branch.adapter_of(model, [style])
            clone = patcher.clone()
            clone.set_transformer_option(branch.OPTION, branch.GuidedLoras(adapter, (branch.Strength(0.8),)))
            one = predict(plain, tokens, width, pictures, clone.model_options["transformer_options"])
            alone = predict(plain, tokens, width, pictures, clone.model_options["transformer_options"], both=False)
            adapter = branch.adapter_of(model, [style, grey])
            strengths = branch.Strength(0.8, -0.2), branch.Strength(0.0, 0.5)
            two = predict(plain, tokens, width, pictures, {branch.OPTION: branch.GuidedLoras(adapter, strengths)})
            assert not adapter.uncalled
            branch.unfollow(model)
            branch.forget_adapter(model)
            after = predict(plain, tokens, width, pictures, {})
            from_exact = "".join(
                f"from the exact {branch_name}: {difference(two[branch_number], truth):.1e}, "
                f"merged {difference(expected[branch_number][branch_number], truth):.1e}; "
                for branch_number, branch_name in enumerate(("positive", "negative"))
                for truth in [exact[branch_number][number][branch_number]]
            ) if exact else ""  # fmt: skip
            print(
                f"{name} {str(dtype)[6:]}, {case}: one LoRA: positive {difference(one[0], expected[0][0]):.1e}, "
                f"negative {difference(one[1], before[1]):.1e}; at cfg 1 {difference(alone[0], expected[0][0]):.1e}; "
                f"two LoRAs: {difference(two[0], expected[0][0]):.1e}, {difference(two[1], expected[1][1]):.1e}; "
                f"{from_exact}"
                f"the LoRA itself changes it by {difference(one[0], before[0]):.2f}; after removal bit-equal: "
                f"{all(map(torch.equal, before, after))}", flush=True,
            )  # fmt: skip


for family in FAMILIES:
    for number_format in FORMATS:
        torch.manual_seed(0)
        compare(family, {"fp32": torch.float32, "bf16": torch.bfloat16}[number_format])
