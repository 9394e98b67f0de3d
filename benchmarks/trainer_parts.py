"""What the rows of trainers.py share: stand-ins for packages, small models, a LoRA, and how an update is compared."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from PIL import Image

from i2l_ext.converters import Lora
from i2l_ext.converters.architectures import ARCHITECTURES, MINI, Architecture, z_image
from i2l_ext.converters.architectures.flux2 import flux2
from i2l_ext.converters.export import export
from i2l_ext.converters.fusing import fuse
from i2l_ext.converters.start_folder import StartFolder

Delta = Callable[[str], torch.Tensor]
"""The update of a module, by its path."""
Build = Callable[[], torch.nn.Module]
"""Makes the small random model."""
STYLE = "my_style.safetensors"
"""The LoRA that the start folder was made of, beside it."""
CLOSE = 1e-4
"""Up to this error, relative to the largest value, an update is the LoRA's."""
REAL = ("parse",)
"""Packages that are never stood in for, as what they do counts. OneTrainer reads names with it."""


class AnyClass(type):
    """The type of a class that is stood in for: it has every name, and takes any arguments."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class AnyModule(ModuleType):
    """A module that has every name: what begins with a capital is a class, which may be inherited from."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = AnyClass(name, (), {"__init__": lambda self, *_, **__: None}) if name[0].isupper() else MagicMock()
        setattr(self, name, made)
        return made


class StandIns:
    """An importer, the last one, for packages that a file of ``checkout`` imports and that are not here."""

    def __init__(self, checkout: Path) -> None:
        self.checkout, self.names = str(checkout.resolve()), set[str]()

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        root, frame = name.partition(".")[0], sys._getframe(1)
        while frame.f_back and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        asked = frame.f_code.co_filename.startswith(self.checkout)
        if (
            root.startswith("_")
            or root in REAL
            or (root not in self.names and (root != name or not asked or (Path(self.checkout) / root).exists()))
        ):
            return None
        self.names.add(root)
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        module = AnyModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def small(family: str) -> tuple[Architecture, Build]:
    """A small architecture of a family, known to the converters, and what builds its model."""
    import diffusers

    if family == "z-image":
        arch = z_image("z-small", "small Z-Image", depth=2, refiners=1, hidden=256, mlp=682, text=32)
        kind, sizes = diffusers.ZImageTransformer2DModel, {
            "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 256, "n_layers": 2,
            "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 32, "axes_dims": [16, 24, 24],
            "axes_lens": [32, 64, 64],
        }  # fmt: skip
    elif family == "flux2":
        sizes = {"depth": 2, "singles": 2, "hidden": 128, "text": 96, "latent": 16}
        arch = flux2("flux2-klein-4b", "small FLUX.2 klein", **sizes)
        kind, sizes = diffusers.Flux2Transformer2DModel, {
            "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32,
            "num_attention_heads": 4, "joint_attention_dim": 96, "axes_dims_rope": (8, 8, 8, 8),
            "guidance_embeds": False,
        }  # fmt: skip
    else:
        arch, kinds = MINI, {module.kind.name: module.kind for module in MINI.modules.values()}
        hidden = kinds["attn.to_q"].d_in
        kind, sizes = diffusers.QwenImageTransformer2DModel, {
            "patch_size": 2, "in_channels": kinds["img_in"].d_in, "out_channels": kinds["proj_out"].d_out // 4,
            "num_layers": MINI.stacks[0].depth, "attention_head_dim": hidden // 4, "num_attention_heads": 4,
            "joint_attention_dim": kinds["txt_in"].d_in, "axes_dims_rope": [hidden // 16, hidden // 16, hidden // 8],
        }  # fmt: skip
    ARCHITECTURES[arch.id] = arch

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return kind(**sizes)

    return arch, build


def style(arch: Architecture, rank: int = 3) -> Lora:
    """A LoRA of the first block of each stack."""
    torch.manual_seed(1)
    falls = torch.tensor([1.0, 0.3, 0.1])
    paths = [path for path, module in (arch.i2l_modules or arch.modules).items() if module.block == 0]
    shapes = {path: arch.modules[path].shape for path in paths}
    return Lora.of(arch, {p: (torch.randn(rank, i), torch.randn(o, rank) * falls) for p, (o, i) in shapes.items()})


def of_peft(model: torch.nn.Module) -> Delta:
    layers: dict[str, Any] = dict(model.named_modules())

    def delta(path: str) -> torch.Tensor:
        layer = layers[path]
        return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight

    return delta


def worst(lora: Lora, delta: Delta) -> float:
    """The largest error of an update, relative to its largest value."""
    with torch.no_grad():
        return max(float((delta(p) - lora.delta(p)).abs().max() / lora.delta(p).abs().max()) for p in lora)


def strength(lora: Lora, file: Path) -> float:
    """The least share of an update that a saved file has."""
    saved = fuse(Lora.read(file)) if lora.arch is not ARCHITECTURES[lora.arch.id] else Lora.read(file)
    return min(float((saved.delta(p) * lora.delta(p)).sum() / lora.delta(p).square().sum()) for p in lora)


def change(parameters: Iterator[tuple[str, torch.Tensor]], mark: str) -> None:
    with torch.no_grad():
        for name, value in parameters:
            if mark in name:
                value.mul_(3)


def commands(told: StartFolder) -> list[list[str]]:
    """The argument lists of train.py."""
    text = (Path(told.folder) / told.run).read_text(encoding="utf-8")
    scope: dict[str, Any] = {"__file__": told.run}
    exec(text[: text.index("\nfor place")] + text[text.index("\nCOMMANDS") : text.index("\nfor command")], scope)  # noqa: S102
    return scope["COMMANDS"]


@contextmanager
def started(trainer: str, lora: Lora) -> Iterator[StartFolder]:
    """A start folder of rank 9 with a picture, beside which lies the LoRA itself, `STYLE`."""
    with tempfile.TemporaryDirectory() as folder:
        lora.save(Path(folder) / STYLE)
        pictures = {"1.png": lambda path: Image.new("RGB", (64, 64), "teal").save(path)}
        yield export(lora, trainer, 9, Path(folder) / "start", stem="style", pictures=pictures)


def comfy_model(family: str) -> torch.nn.Module:
    """ComfyUI's class, which must be on the path."""
    operations = importlib.import_module("comfy.ops").disable_weight_init
    torch.manual_seed(0)
    if family == "z-image":
        model = importlib.import_module("comfy.ldm.lumina.model").NextDiT(
            in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, multiple_of=1,
            ffn_dim_multiplier=682 / 256, qk_norm=True, cap_feat_dim=32, axes_dims=[16, 24, 24],
            axes_lens=[32, 64, 64], z_image_modulation=True, dtype=torch.float32, operations=operations,
        )  # fmt: skip
    else:
        model = importlib.import_module("comfy.ldm.flux.model").Flux(
            in_channels=16, out_channels=16, vec_in_dim=None, context_in_dim=96, hidden_size=128, mlp_ratio=3.0,
            num_heads=4, depth=2, depth_single_blocks=2, axes_dim=[8, 8, 8, 8], theta=2000, patch_size=1,
            qkv_bias=False, guidance_embed=False, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True,
            ops_bias=False, dtype=torch.float32, operations=operations,
        )  # fmt: skip
    for parameter in model.parameters():  # its operations leave what they were given
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def imported(name: str) -> Any:
    """A module that something else than a checkout imports; a stand-in for it where it is not here."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return sys.modules.setdefault(name, AnyModule(name))


def commit(checkout: Path) -> str:
    """A checkout's name and commit."""
    words = ["git", "-C", str(checkout), "log", "-1", "--format=%h of %cs"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"{checkout.resolve().name} {done.stdout.strip() or 'of an unknown commit'}"


def first_implementation(trainer: str, family: str, checkout: Path) -> torch.nn.Module:
    """The trainer's own class of FLUX.2, or ComfyUI's of it and of Z-Image; as small as that of `small`."""
    if trainer == "diffusion-pipe":
        return comfy_model(family)
    package = "musubi_tuner.flux_2.flux2_models"
    if trainer == "ai-toolkit":
        package = "extensions_built_in.diffusion_models.flux2.src.model"
    sys.path[:0] = [str(checkout), str(checkout / "src")]
    models = importlib.import_module(package)
    sizes = {"in_channels": 16, "context_in_dim": 96, "hidden_size": 128, "num_heads": 4, "depth": 2,
             "depth_single_blocks": 2, "axes_dim": [8, 8, 8, 8], "use_guidance_embed": False}  # fmt: skip
    torch.manual_seed(0)
    return models.Flux2(models.Flux2Params(**sizes))
