"""A row of docs/trainers.md: python benchmarks/trainers.py TRAINER FAMILY [--checkout FOLDER].

A small random model of the real class, a start folder as `i2l export` writes it, and the trainer's own code: load the
LoRA, compare it at step 0, save it, train it (or change it), resume. For musubi-tuner: with its own Python, and
--checkout names its folder. DiffSynth-Studio and diffusers are taken from the environment.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from i2l_ext.converters import Lora
from i2l_ext.converters.architectures import ARCHITECTURES, MINI, Architecture, z_image
from i2l_ext.converters.architectures.flux2 import flux2
from i2l_ext.converters.export import StartFolder, export

Delta = Callable[[str], torch.Tensor]
"""The update of a module, by its path."""


def small(family: str) -> tuple[Architecture, Callable[[], torch.nn.Module]]:
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
    saved = Lora.read(file)
    return min(float((saved.delta(p) * lora.delta(p)).sum() / lora.delta(p).square().sum()) for p in lora)


def change(parameters: Iterator[tuple[str, torch.Tensor]], mark: str) -> None:
    with torch.no_grad():
        for name, value in parameters:
            if mark in name:
                value.mul_(3)


def diffsynth(lora: Lora, build: Callable[[], torch.nn.Module], told: StartFolder, _: Path) -> dict[str, Any]:
    """Its targets, loader, mapping and saving; resumed: its own file as --lora_checkpoint."""
    from safetensors.torch import load_file, save_file

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from peers import diffsynth as peer
    from test_trainers import diffsynth_training

    folder, [words] = Path(told.folder), commands(told)
    targets = words[words.index("--lora_target_modules") + 1]

    def load(file: str | Path) -> tuple[Any, torch.nn.Module, Any]:
        module = diffsynth_training()
        model = module.add_lora_to_model(build(), module.parse_lora_target_modules(None, targets), told.rank)
        state = peer("utils.lora.general").GeneralLoRALoader().convert_state_dict(load_file(file))
        return module, model, model.load_state_dict(module.mapping_lora_state_dict(state), strict=False)

    def save(module: Any, model: torch.nn.Module, name: str) -> Path:
        module.pipe = torch.nn.ModuleDict({"dit": model})
        for key, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in key)
        state = module.export_trainable_state_dict(module.state_dict(), remove_prefix="pipe.dit.")
        save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
        return folder / name

    module, model, outcome = load(told.init)
    row = {"loads": not outcome.unexpected_keys, "step 0": worst(lora, of_peft(model))}
    row["strength"] = strength(lora, save(module, model, "saved.safetensors"))
    change(model.named_parameters(), "lora_B")
    again = dict(load(save(module, model, "trained.safetensors"))[1].named_parameters())
    kept = all(torch.equal(value, again[key]) for key, value in model.named_parameters() if "lora_" in key)
    return {**row, "resumed": kept, "version": f"diffsynth {version('diffsynth')}"}


def diffusers(lora: Lora, build: Callable[[], torch.nn.Module], told: StartFolder, _: Path) -> dict[str, Any]:
    """start.py; saving and resuming as its training scripts do."""
    import diffusers as library
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    kinds = {"qwen-image": "QwenImagePipeline", "z-image": "ZImagePipeline", "flux2": "Flux2KleinPipeline"}
    pipe, folder = getattr(library, kinds[lora.arch.family]), Path(told.folder)
    scope: dict[str, Any] = {"__name__": "start"}
    exec((folder / "start.py").read_text(encoding="utf-8"), scope)  # noqa: S102 - our own text, as a user runs it
    model, again = build(), build()
    scope["start"](model)
    row = {"loads": True, "step 0": worst(lora, of_peft(model))}
    pipe.save_lora_weights(folder / "saved", get_peft_model_state_dict(model))
    row["strength"] = strength(lora, next((folder / "saved").iterdir()))
    change(model.named_parameters(), "lora_B")
    pipe.save_lora_weights(folder / "checkpoint", get_peft_model_state_dict(model))
    scope["start"](again)
    state = pipe.lora_state_dict(folder / "checkpoint")
    state = {key.removeprefix("transformer."): value for key, value in state.items()}
    set_peft_model_state_dict(again, convert_unet_state_dict_to_peft(state), adapter_name="default")
    new = get_peft_model_state_dict(again)
    kept = all(torch.equal(value, new[key]) for key, value in get_peft_model_state_dict(model).items())
    return {**row, "resumed": kept, "version": f"diffusers {version('diffusers')}, peft {version('peft')}"}


def musubi(lora: Lora, build: Callable[[], torch.nn.Module], told: StartFolder, checkout: Path) -> dict[str, Any]:
    """Its parser, `_build_network`, a step, `--resume` (accelerate's state, in its own order) and `save_weights`."""
    sys.path[:0] = [str(checkout / "src"), str(Path(__file__).resolve().parents[1] / "tests")]
    from importlib import import_module

    from accelerate import Accelerator

    from test_hooks import small as blocks

    name = "qwen_image" if lora.arch.family == "qwen-image" else "zimage"
    scripts = import_module(f"musubi_tuner.{name}_train_network")
    base = import_module("musubi_tuner.training.trainer_base")
    [trainer] = [one for one in vars(base).values() if isinstance(one, type) and hasattr(one, "_build_network")]
    words = commands(told)[-1]
    words = words[next(at for at, word in enumerate(words) if word.endswith("train_network.py")) + 1 :]

    def start(*more: str) -> tuple[Any, Any, Any]:
        parser = getattr(scripts, f"{name}_setup_parser")(scripts.setup_parser_common())
        args = parser.parse_args([*words, *more])
        args.gradient_checkpointing = False
        accelerator = Accelerator(cpu=True)
        unet = blocks(type(build()).__name__, lora.arch)
        network = trainer._build_network(SimpleNamespace(), args, accelerator, unet, None, torch.float32)
        network, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
        trainer.resume_from_local_or_hf_if_specified(SimpleNamespace(), accelerator, args)
        return accelerator, network, optimizer

    accelerator, network, optimizer = start()
    layers = {layer.lora_name.removeprefix("lora_unet_"): layer for layer in network.unet_loras}

    def delta(path: str) -> torch.Tensor:
        layer = layers[path.replace(".", "_")]
        return layer.scale * layer.lora_up.weight @ layer.lora_down.weight

    row: dict[str, Any] = {"loads": True, "step 0": worst(lora, delta)}
    network.save_weights(str(Path(told.folder) / "saved.safetensors"), torch.float32, {})
    row["strength"] = strength(lora, Path(told.folder) / "saved.safetensors")
    probes = [(layer, torch.randn(4, layer.lora_down.in_features)) for layer in layers.values()]
    sum((layer.lora_up(layer.lora_down(x)) ** 2).mean() for layer, x in probes).backward()
    optimizer.step()
    accelerator.save_state(str(Path(told.folder) / "state"))
    _, again, _ = start("--resume", str(Path(told.folder) / "state"))
    pairs = [*zip(network.parameters(), again.parameters(), strict=True)]
    return {**row, "resumed": all(torch.equal(*pair) for pair in pairs), "version": checkout.name}


def commands(told: StartFolder) -> list[list[str]]:
    """The argument lists of train.py."""
    text = (Path(told.folder) / told.run).read_text(encoding="utf-8")
    scope: dict[str, Any] = {"__file__": told.run}
    exec(text[: text.index("\nfor place")] + text[text.index("\nCOMMANDS") : text.index("\nfor command")], scope)  # noqa: S102
    return scope["COMMANDS"]


@contextmanager
def started(trainer: str, lora: Lora) -> Iterator[StartFolder]:
    with tempfile.TemporaryDirectory() as folder:
        yield export(lora, trainer, 5, Path(folder) / "start", stem="style")


TRAINERS = {"musubi-tuner": musubi, "diffsynth": diffsynth, "diffusers": diffusers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("family", choices=("qwen-image", "z-image", "flux2"))
    parser.add_argument("--checkout", type=Path, default=Path())
    args = parser.parse_args()
    arch, build = small(args.family)
    lora = style(arch)
    with started(args.trainer, lora) as told:
        print(json.dumps(TRAINERS[args.trainer](lora, build, told, args.checkout)))


if __name__ == "__main__":
    main()
