"""A row of docs/trainers.md: python benchmarks/trainers.py TRAINER FAMILY [--checkout FOLDER].

A small random model of the real class, a start folder as `i2l export` writes it, and the trainer's own code: load the
LoRA, compare it at step 0, save it, train it (or change it), resume. DiffSynth-Studio and diffusers are taken from the
environment; of any other --checkout names the folder. What a checkout imports and this Python lacks is stood in for by
modules whose every name does nothing; the row tells which ("stood in").
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from i2l_ext.converters import Lora
from i2l_ext.converters import trainers as exported
from i2l_ext.converters.fusing import fuse
from i2l_ext.converters.start_folder import StartFolder
from trainer_parts import (
    CLOSE,
    STYLE,
    Build,
    StandIns,
    change,
    commands,
    commit,
    first_implementation,
    imported,
    of_peft,
    small,
    started,
    strength,
    style,
    worst,
)  # fmt: skip
from trainer_runs import aitoolkit, flymyai, peft_hook


def diffsynth(lora: Lora, build: Build, told: StartFolder, _: Path) -> dict[str, Any]:
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


def diffusers(lora: Lora, build: Build, told: StartFolder, _: Path, hook: bool = False) -> dict[str, Any]:
    """start.py, or the hook over an adapter of its own; saving and resuming as its training scripts do."""
    import diffusers as library
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    kinds = {"qwen-image": "QwenImagePipeline", "z-image": "ZImagePipeline", "flux2": "Flux2KleinPipeline"}
    pipe, folder = getattr(library, kinds[lora.arch.family]), Path(told.folder)
    scope: dict[str, Any] = {"__name__": "start"}
    exec((folder / "start.py").read_text(encoding="utf-8"), scope)  # noqa: S102 - our own text, as a user runs it
    start = partial(peft_hook, lora=lora, told=told) if hook else scope["start"]
    model, again = build(), build()
    start(model)
    row = {"step 0": worst(lora, of_peft(model))}
    pipe.save_lora_weights(folder / "saved", get_peft_model_state_dict(model))
    row["strength"] = strength(lora, next((folder / "saved").iterdir()))
    change(model.named_parameters(), "lora_B")
    pipe.save_lora_weights(folder / "checkpoint", get_peft_model_state_dict(model))
    start(again)
    state = pipe.lora_state_dict(folder / "checkpoint")
    state = {key.removeprefix("transformer."): value for key, value in state.items()}
    set_peft_model_state_dict(again, convert_unet_state_dict_to_peft(state), adapter_name="default")
    new = get_peft_model_state_dict(again)
    kept = all(torch.equal(value, new[key]) for key, value in get_peft_model_state_dict(model).items())
    return {**row, "resumed": kept, "version": f"diffusers {version('diffusers')}, peft {version('peft')}"}


def simpletuner(lora: Lora, build: Build, told: StartFolder, checkout: Path) -> dict[str, Any]:
    """Its model's `add_lora_adapter` with the written options, over its own class of the transformer; saved as its
    hook saves, and resumed by `load_lora_weights`, which its hook calls for a checkpoint."""
    sys.path.insert(0, str(checkout))
    from peft.utils import get_peft_model_state_dict

    stem, name = {"qwen-image": ("qwen_image", "QwenImage"), "z-image": ("z_image", "ZImage"),
                  "flux2": ("flux2", "Flux2")}[lora.arch.family]  # fmt: skip
    kind = getattr(importlib.import_module(f"simpletuner.helpers.models.{stem}.model"), name)
    folder, known = Path(told.folder), inspect.signature(kind.MODEL_CLASS.__init__).parameters
    sizes = {key: value for key, value in build().config.items() if key in known}
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    defaults = {"lora_dropout": 0.0, "lora_initialisation_style": True, "controlnet": False, "lora_format": None}

    def start() -> tuple[Any, Any]:
        wrapper = object.__new__(kind)
        wrapper.config, wrapper.controlnet, wrapper.accelerator = SimpleNamespace(**defaults, **given), None, None
        wrapper.unwrap_model = lambda model=None: model if model is not None else wrapper.model
        wrapper.get_trained_component = lambda **_: wrapper.model
        torch.manual_seed(0)
        wrapper.model = kind.MODEL_CLASS(**sizes)
        return wrapper, wrapper.add_lora_adapter()

    wrapper, (unknown, missing) = start()
    lost = [path for path in lora for key in missing if key.startswith(f"transformer.{path}.lora_")]
    row = {"loads": not unknown and not lost, "step 0": worst(lora, of_peft(wrapper.model))}
    wrapper.save_lora_weights(str(folder / "saved"), transformer_lora_layers=get_peft_model_state_dict(wrapper.model))
    row["strength"] = strength(lora, next((folder / "saved").glob("*.safetensors")))
    change(wrapper.model.named_parameters(), "lora_B")
    trained = get_peft_model_state_dict(wrapper.model)
    wrapper.save_lora_weights(str(folder / "trained"), transformer_lora_layers=trained)
    again, _ = start()
    again.load_lora_weights([again.model], str(folder / "trained"))
    new = get_peft_model_state_dict(again.model)
    return {**row, "resumed": all(torch.equal(value, new[key]) for key, value in trained.items())}


def onetrainer(lora: Lora, build: Build, told: StartFolder, checkout: Path) -> dict[str, Any]:
    """Its TrainConfig, its loader and its LoRAModuleWrapper, in the order of its setup; its saver; and its backup,
    which a run that goes on loads in the LoRA's place."""
    sys.path.insert(0, str(checkout))
    imported("gguf")  # by diffusers, for weights that are not used here
    from modules.modelLoader.mixin.LoRALoaderMixin import LoRALoaderMixin
    from modules.module.LoRAModule import LoRAModuleWrapper
    from modules.util.config.TrainConfig import TrainConfig
    from modules.util.enum.ModelFormat import ModelFormat
    from modules.util.ModelNames import ModelNames

    stem, name = {"qwen-image": ("qwen", "Qwen"), "z-image": ("zImage", "ZImage"), "flux2": ("flux2", "Flux2")}[
        lora.arch.family
    ]
    model_class = getattr(importlib.import_module(f"modules.model.{name}Model"), f"{name}Model")
    saver = getattr(importlib.import_module(f"modules.modelSaver.{stem}.{name}LoRASaver"), f"{name}LoRASaver")()
    folder = Path(told.folder)
    config = TrainConfig.default_values().from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))

    def start(file: str | Path) -> tuple[Any, Any]:
        model = model_class(config.model_type)
        model.transformer, model.text_encoder, model.train_config = build(), torch.nn.Module(), None
        type("Loader", (LoRALoaderMixin,), {})()._load(model, ModelNames(lora=str(file)))
        filters = config.layer_filter.split(",")
        model.transformer_lora = LoRAModuleWrapper(
            model.transformer, "transformer", config, filters, fusion_spec=model.fusion_groups(),
            fuse=config.output_model_format.needs_qkv_fusion(),
        )  # fmt: skip
        model.transformer_lora.load_state_dict(model.lora_state_dict)
        model.lora_state_dict = None
        model.transformer_lora.hook_to_module()
        return model, model.transformer_lora.lora_modules

    model, layers = start(config.lora_model_name)

    def delta(path: str) -> torch.Tensor:
        layer = layers[path]
        return layer.alpha / layer.rank * layer.lora_up.weight @ layer.lora_down.weight

    row: dict[str, Any] = {"loads": layers.keys() == lora.specs.keys(), "step 0": worst(lora, delta)}
    saver.save(model, config.output_model_format, str(folder / "saved.safetensors"), torch.float32)
    row["strength"] = strength(lora, folder / "saved.safetensors")
    change(((key, value) for layer in layers.values() for key, value in layer.named_parameters()), "lora_up")
    saver.save(model, ModelFormat.INTERNAL, str(folder / "backup"), None)
    (folder / "backup/meta.json").write_text("{}")
    kept, new = model.transformer_lora.state_dict(), start(folder / "backup")[0].transformer_lora.state_dict()
    return {**row, "resumed": all(torch.equal(value, new[key]) for key, value in kept.items())}


def diffusion_pipe(lora: Lora, build: Build, told: StartFolder, checkout: Path) -> dict[str, Any]:
    """`configure_adapter` and `load_adapter_weights` of its pipeline, and its Saver; of Z-Image and FLUX.2 over the
    class of its ComfyUI (submodules/ComfyUI). DeepSpeed keeps its checkpoints, so what is resumed is its own file as
    `init_from_existing`."""
    sys.path.insert(0, str(checkout))
    from utils.saver import Saver  # first: ComfyUI has a package of that name too

    if (comfy := checkout / "submodules/ComfyUI").is_dir():
        sys.path.append(str(comfy))
        importlib.import_module("comfy.cli_args").args.cpu = True
    stem, name, part = {"qwen-image": ("qwen_image", "QwenImage", "transformer"),
                        "z-image": ("z_image", "ZImage", "diffusion_model"),
                        "flux2": ("flux2", "Flux2", "diffusion_model")}[lora.arch.family]  # fmt: skip
    kind = getattr(importlib.import_module(f"models.{stem}"), f"{name}Pipeline")

    try:
        import tomllib as toml
    except ModuleNotFoundError:
        import tomli as toml
    folder = Path(told.folder)
    given = toml.loads((folder / "config.toml").read_text(encoding="utf-8"))["adapter"]
    adapter = {**given, "alpha": given["rank"], "dropout": 0.0, "dtype": torch.float32}

    def start(existing: str | Path) -> Any:
        pipe = object.__new__(kind)
        setattr(pipe, part, build())
        pipe.configure_adapter(adapter)
        pipe.load_adapter_weights(existing)
        return pipe

    def save(pipe: Any, name: str) -> Path:
        grid = SimpleNamespace(get_data_parallel_rank=lambda: 0, get_pipe_parallel_rank=lambda: 0)
        args, engine = SimpleNamespace(config=str(folder / "config.toml")), SimpleNamespace(grid=grid)
        saver = Saver(args, {}, True, folder.parent / "output", pipe, None, engine, getattr(pipe, part))
        saver.save_adapter(name)
        return folder.parent / "output" / name

    pipe = start(given["init_from_existing"])
    row: dict[str, Any] = {"step 0": worst(lora, of_peft(getattr(pipe, part)))}
    row["strength"] = strength(lora, save(pipe, "saved") / "adapter_model.safetensors")
    change(getattr(pipe, part).named_parameters(), "lora_B")
    new = dict(getattr(start(save(pipe, "trained")), part).named_parameters())
    kept = ((key, value) for key, value in getattr(pipe, part).named_parameters() if "lora_" in key)
    return {**row, "resumed": all(torch.equal(value, new[key]) for key, value in kept)}


def musubi(lora: Lora, build: Build, told: StartFolder, checkout: Path, hook: bool = False) -> dict[str, Any]:
    """Its parser, `_build_network`, a step, `--resume` (accelerate's state, in its own order) and `save_weights`. With
    the hook the LoRA is not named by --network_weights, and the saved file goes on over the hook by that option too."""
    sys.path[:0] = [str(checkout / "src"), str(Path(__file__).resolve().parents[1] / "tests")]
    from importlib import import_module

    from accelerate import Accelerator

    from test_hooks import small as blocks

    name = {"qwen-image": "qwen_image", "z-image": "zimage", "flux2": "flux_2"}[lora.arch.family]
    scripts = import_module(f"musubi_tuner.{name}_train_network")
    base = import_module("musubi_tuner.training.trainer_base")
    [trainer] = [one for one in vars(base).values() if isinstance(one, type) and hasattr(one, "_build_network")]
    words = commands(told)[-1]
    words = words[next(at for at, word in enumerate(words) if word.endswith("train_network.py")) + 1 :]
    if hook:
        words = [*words, "--network_module", "i2l_ext.hooks.musubi", "--network_alpha", "1"]
        words += ["--network_args", f"init={Path(told.folder).parent / STYLE}"]
        del words[(at := words.index("--network_weights")) : at + 2]

    def start(*more: str) -> tuple[Any, Any, Any]:
        parser = getattr(scripts, f"{name.replace('x_', 'x')}_setup_parser")(scripts.setup_parser_common())
        args = parser.parse_args([*words, *more])
        args.gradient_checkpointing = False
        accelerator = Accelerator(cpu=True)
        unet = build() if name == "flux_2" else blocks(type(build()).__name__, lora.arch)
        network = trainer._build_network(SimpleNamespace(), args, accelerator, unet, None, torch.float32)
        network, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
        trainer.resume_from_local_or_hf_if_specified(SimpleNamespace(), accelerator, args)
        return accelerator, network, optimizer

    accelerator, network, optimizer = start()
    layers = {layer.lora_name.removeprefix("lora_unet_"): layer for layer in network.unet_loras}

    def delta(path: str) -> torch.Tensor:
        layer = layers[path.replace(".", "_")]
        return layer.scale * layer.lora_up.weight @ layer.lora_down.weight

    row: dict[str, Any] = {"step 0": worst(lora, delta)}
    network.save_weights(str(Path(told.folder) / "saved.safetensors"), torch.float32, {})
    row["strength"] = strength(lora, Path(told.folder) / "saved.safetensors")
    probes = [(layer, torch.randn(4, layer.lora_down.in_features)) for layer in layers.values()]
    sum((layer.lora_up(layer.lora_down(x)) ** 2).mean() for layer, x in probes).backward()
    optimizer.step()
    accelerator.save_state(str(Path(told.folder) / "state"))
    network.save_weights(str(Path(told.folder) / "trained.safetensors"), torch.float32, {})
    ways = [("--resume", "state"), *([("--network_weights", "trained.safetensors")] if hook else [])]
    resumed = [start(option, str(Path(told.folder) / name))[1].parameters() for option, name in ways]
    kept = all(torch.equal(*pair) for again in resumed for pair in zip(network.parameters(), again, strict=True))
    return {**row, "resumed": kept}


ROWS = {
    "musubi-tuner": musubi, "musubi-tuner-hook": partial(musubi, hook=True), "ai-toolkit": aitoolkit,
    "ai-toolkit-hook": partial(aitoolkit, hook=True), "diffsynth": diffsynth, "diffusers": diffusers,
    "diffusers-hook": partial(diffusers, hook=True), "simpletuner": simpletuner, "onetrainer": onetrainer,
    "diffusion-pipe": diffusion_pipe, "flymyai": flymyai,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=ROWS)
    parser.add_argument("family", choices=("qwen-image", "z-image", "flux2"))
    parser.add_argument("--checkout", type=Path, default=Path())
    args = parser.parse_args()
    stood_in, trainer = StandIns(args.checkout), args.trainer.removesuffix("-hook")
    arch, build = small(args.family)
    lora = style(arch)
    with started(trainer, lora) as told:
        row = {"trainer": args.trainer, "family": args.family}
        if args.checkout != Path():
            sys.meta_path.append(stood_in)
            row["version"] = commit(args.checkout)
        if exported.TRAINERS[trainer].models[args.family].fused:
            lora, build = fuse(lora), partial(first_implementation, trainer, args.family, args.checkout)
        row |= ROWS[args.trainer](lora, build, told, args.checkout)
        row["loads"] = row.get("loads", True) and row["step 0"] < CLOSE
        print(json.dumps({**row, "stood in": sorted(stood_in.names)}))


if __name__ == "__main__":
    main()
