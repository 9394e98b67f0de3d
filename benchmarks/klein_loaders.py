"""What a program's own loader does with a FLUX.2 klein LoRA of each key format:
python benchmarks/klein_loaders.py PROGRAM [--checkout FOLDER]

Prints {key format, scale: outcome}, as tests/recorded/klein.json has it.

A small random model of the program's class, a LoRA of its first blocks, and the loader. An outcome: whole; part K of N;
nothing; error TYPE. Behind it the factor, where the update is another than the file says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch

from i2l_ext.converters import Lora
from i2l_ext.converters.fusing import fuse
from i2l_ext.converters.key_formats import KEY_FORMATS
from trainer_parts import StandIns, comfy_model, commit, first_implementation, imported, of_peft, small, style

Updates = Mapping[str, torch.Tensor]
"""Path of a layer, in the program's own model, to the update that it got."""


def diffusers(file: Path, build: Callable[[], torch.nn.Module], _: Lora) -> Updates:
    from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin

    pipeline = type("Pipeline", (Flux2LoraLoaderMixin,), {"hf_device_map": None, "components": {}})()
    pipeline.transformer = build()
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="default")
    return peft_updates(pipeline.transformer)


def diffsynth(file: Path, build: Callable[[], torch.nn.Module], _: Lora) -> Updates:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from peers import diffsynth as peer

    model = build()
    linear = {path: layer for path, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    for layer in linear.values():
        torch.nn.init.zeros_(layer.weight)
    state = safetensors.torch.load_file(file)
    peer("utils.lora.general").GeneralLoRALoader().fuse_lora_to_base_model(model, state)
    return {path: layer.weight.detach() for path, layer in linear.items() if layer.weight.any()}


def comfyui(file: Path, build: Callable[[], torch.nn.Module], _: Lora) -> Updates:
    """What LoraLoaderModelOnly does: the map of names, `convert_lora`, `load_lora`, and the weights calculated."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base

    model: Any = object.__new__(comfy.model_base.Flux2)
    torch.nn.Module.__init__(model)
    model.diffusion_model = comfy_model("flux2")
    sizes = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 128}
    model.model_config = SimpleNamespace(unet_config=sizes)
    names = comfy.lora.model_lora_keys_unet(model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(safetensors.torch.load_file(file)), names)
    weights, found = model.state_dict(), {}
    by_weight: dict[str, list[Any]] = {}
    for key, patch in loaded.items():
        name, offset = (key, None) if isinstance(key, str) else (key[0], key[1])
        by_weight.setdefault(name, []).append((1.0, patch, 1.0, offset, None))
    for name, patches in by_weight.items():
        weight = torch.zeros_like(weights[name])
        path = name.removeprefix("diffusion_model.").removesuffix(".weight")
        found[path] = comfy.lora.calculate_weight(patches, weight, name)
    return found


def musubi(file: Path, build: Callable[[], torch.nn.Module], lora: Lora) -> Updates:
    network_module = importlib.import_module("musubi_tuner.networks.lora_flux_2")
    rank = ranks(file)
    model = build()
    network = network_module.create_arch_network(1.0, rank, float(rank), None, None, model)
    network.apply_to(None, model, False, True)
    network.load_weights(str(file))
    return kohya_updates(network.unet_loras, "lora_unet_", model)


def musubi_merge(file: Path, build: Callable[[], torch.nn.Module], lora: Lora) -> Updates:
    utils = importlib.import_module("musubi_tuner.utils.lora_utils")
    model = build()
    zeros = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    base = file.with_name("base.safetensors")
    safetensors.torch.save_file(zeros, base)
    state = utils.load_safetensors_with_lora_and_fp8(
        [str(base)], [safetensors.torch.load_file(file)], [1.0], False, torch.device("cpu"), dit_weight_dtype=None
    )
    return {key.removesuffix(".weight"): value for key, value in state.items() if value.ndim == 2 and value.any()}


def ai_toolkit(file: Path, build: Callable[[], torch.nn.Module], lora: Lora) -> Updates:
    imported("diffusers.pipelines.ltx2.export_utils").encode_video = None
    import yaml

    sys.modules.setdefault("oyaml", yaml)
    config = importlib.import_module("toolkit.config_modules")
    special = importlib.import_module("toolkit.lora_special").LoRASpecialNetwork
    get_model_class = importlib.import_module("toolkit.util.get_model").get_model_class
    rank = ranks(file)
    options = config.NetworkConfig(type="lora", linear=rank, linear_alpha=rank)
    told = config.ModelConfig(name_or_path="x", arch="flux2_klein_4b")
    sd, unet = get_model_class(told)("cpu", told), build()
    network = special(
        text_encoder=None, unet=unet, lora_dim=rank, multiplier=1.0, alpha=rank, train_unet=True,
        train_text_encoder=False, network_config=options, network_type="lora", transformer_only=True,
        is_transformer=sd.is_transformer, base_model=sd, target_lin_modules=sd.target_lora_modules,
    )  # fmt: skip
    network.force_to("cpu", dtype=torch.float32)
    network._update_torch_multiplier()
    network.apply_to(None, unet, False, True)
    network.load_weights(str(file))
    return kohya_updates(network.unet_loras, "transformer$$", unet)


def simpletuner(file: Path, build: Callable[[], torch.nn.Module], lora: Lora) -> Updates:
    kind = importlib.import_module("simpletuner.helpers.models.flux2.model").Flux2
    known = importlib.import_module("inspect").signature(kind.MODEL_CLASS.__init__).parameters
    wrapper = object.__new__(kind)
    rank = ranks(file)
    wrapper.config = SimpleNamespace(
        lora_dropout=0.0, lora_initialisation_style=True, controlnet=False, lora_format=None, init_lora=str(file),
        lora_rank=rank, lora_alpha=rank, peft_lora_target_modules=[*lora],
    )  # fmt: skip
    wrapper.controlnet = wrapper.accelerator = None
    wrapper.unwrap_model = lambda model=None: model if model is not None else wrapper.model
    wrapper.get_trained_component = lambda **_: wrapper.model
    wrapper.model = kind.MODEL_CLASS(**{key: value for key, value in build().config.items() if key in known})
    wrapper.add_lora_adapter()
    return peft_updates(wrapper.model)


def ranks(file: Path) -> int:
    with safetensors.safe_open(file, "pt") as opened:
        return max(opened.get_slice(key).get_shape()[0] for key in [*opened.keys()] if "lora_A" in key or "down" in key)


def peft_updates(model: torch.nn.Module) -> Updates:
    adapted = [path for path, layer in model.named_modules() if hasattr(layer, "lora_A")]
    updates = {path: of_peft(model)(path).detach() for path in adapted}
    return {path: update for path, update in updates.items() if update.any()}


def kohya_updates(layers: list[Any], prefix: str, model: torch.nn.Module) -> Updates:
    names = {name.replace(".", "_"): name for name, _ in model.named_modules()}
    found = {}
    for layer in layers:
        name = layer.lora_name.removeprefix(prefix).replace("$$", ".")
        update = (layer.scale * layer.lora_up.weight @ layer.lora_down.weight).detach()
        if update.any():
            found[names.get(name, name)] = update
    return found


PROGRAMS: dict[str, tuple[Callable[..., Updates], bool]] = {
    "diffusers": (diffusers, False), "diffsynth": (diffsynth, False), "comfyui": (comfyui, True),
    "musubi-tuner": (musubi, True), "musubi-tuner-lora-weight": (musubi_merge, True), "ai-toolkit": (ai_toolkit, True),
    "simpletuner": (simpletuner, False),
}  # fmt: skip
"""Id of a program in `i2l check` -> its loader, and whether its model has the layers of the first implementation."""


def outcome(load: Callable[[Path], Updates], file: Path, lora: Lora) -> str:
    try:
        found = load(file)
    except Exception as error:  # noqa: BLE001 what a loader raises is what we want to know
        return f"error {type(error).__name__}"
    ratios = [float((found[p] * lora.delta(p)).sum() / lora.delta(p).square().sum()) for p in lora if p in found]
    ratios = [ratio for ratio in ratios if abs(ratio) > 1e-6]
    if not ratios:
        return "nothing"
    words = "whole" if len(ratios) == len(lora) else f"part {len(ratios)} of {len(lora)}"
    least, most = min(ratios), max(ratios)
    return words if abs(most - 1) + abs(least - 1) < 2e-3 else f"{words}, x{least:.3g} to x{most:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--checkout", type=Path, default=Path())
    args = parser.parse_args()
    load, is_fused = PROGRAMS[args.program]
    arch, build = small("flux2")
    lora = style(arch)
    if args.checkout != Path():
        sys.path[:0] = [str(args.checkout), str(args.checkout / "src")]
        sys.meta_path.append(StandIns(args.checkout))
        print(commit(args.checkout))
    if args.program == "comfyui":
        importlib.import_module("comfy.cli_args").args.cpu = True
    elif is_fused:
        trainer = args.program.removesuffix("-lora-weight")
        build = partial(first_implementation, trainer, "flux2", args.checkout)
    shown = fuse(lora) if is_fused else lora
    told = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, key_format in KEY_FORMATS.items():
            for scale in ("none", "half"):
                file = Path(folder) / f"{name}-{scale}.safetensors"
                lora.save(file, name)
                state, factor = safetensors.torch.load_file(file), 1.0
                stems = {key.removesuffix(key_format.down): tensor.shape[0] for key, tensor in state.items()
                         if key.endswith(key_format.down)}  # fmt: skip
                if scale == "half":
                    state |= {f"{stem}.alpha": torch.tensor(rank / 2) for stem, rank in stems.items()}
                    factor = 0.5
                safetensors.torch.save_file(state, file)
                told[f"{name}, {scale}"] = outcome(lambda file: load(file, build, lora), file, shown.scaled(factor))
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
