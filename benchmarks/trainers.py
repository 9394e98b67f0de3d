"""A row of docs/trainers.md: python benchmarks/trainers.py TRAINER FAMILY [--checkout FOLDER].

A small random model of the real class, a start folder as `i2l export` writes it, and the trainer's own code: load the
LoRA, compare it at step 0, save it, train it (or change it), resume. DiffSynth-Studio and diffusers are taken from the
environment; of any other --checkout names the folder. What a checkout imports and this Python lacks is stood in for by
modules whose every name does nothing; the row tells which ("stood in").
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

from i2l_ext.converters import Lora
from i2l_ext.converters import trainers as exported
from i2l_ext.converters.architectures import ARCHITECTURES, MINI, Architecture, z_image
from i2l_ext.converters.architectures.flux2 import flux2
from i2l_ext.converters.export import StartFolder, export
from i2l_ext.converters.fusing import fuse

Delta = Callable[[str], torch.Tensor]
"""The update of a module, by its path."""
Build = Callable[[], torch.nn.Module]
"""Makes the small random model."""


class StandIns:
    """An importer, the last one, for packages that a file of ``checkout`` imports and that are not here."""

    def __init__(self, checkout: Path) -> None:
        self.checkout, self.names = str(checkout.resolve()), set[str]()

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        root, frame = name.partition(".")[0], sys._getframe(1)
        while frame.f_back and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        asked = frame.f_code.co_filename.startswith(self.checkout)
        if root.startswith("_") or (
            root not in self.names and (root != name or not asked or (Path(self.checkout) / root).exists())
        ):
            return None
        self.names.add(root)
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__ = spec, []
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


def diffusers(lora: Lora, build: Build, told: StartFolder, _: Path) -> dict[str, Any]:
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


def ai_toolkit(lora: Lora, build: Build, told: StartFolder, checkout: Path) -> dict[str, Any]:
    """Its NetworkConfig from config.yaml, its network over its own model class, its loading and saving. The order is
    that of BaseSDTrainProcess; a resumed run loads the newest file of its name by the same `load_weights`."""
    sys.path.insert(0, str(checkout))
    import diffusers.pipelines.ltx2.export_utils as videos
    import yaml

    vars(videos).setdefault("encode_video", None)  # its video models want a name of a later diffusers
    from toolkit.config_modules import ModelConfig, NetworkConfig
    from toolkit.lora_special import LoRASpecialNetwork
    from toolkit.util.get_model import get_model_class

    folder = Path(told.folder)
    process = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["config"]["process"][0]
    options, model = NetworkConfig(**process["network"]), ModelConfig(**process["model"])
    sd = get_model_class(model)("cpu", model)

    def start(file: str | Path) -> Any:
        unet = build()
        network = LoRASpecialNetwork(
            text_encoder=None, unet=unet, lora_dim=options.linear, multiplier=1.0, alpha=options.linear_alpha,
            train_unet=True, train_text_encoder=False, network_config=options, network_type=options.type,
            transformer_only=options.transformer_only, is_transformer=sd.is_transformer, base_model=sd,
            target_lin_modules=sd.target_lora_modules, **options.network_kwargs,
        )  # fmt: skip
        network.force_to("cpu", dtype=torch.float32)
        network._update_torch_multiplier()
        network.apply_to(None, unet, False, True)
        network.load_weights(str(file))
        return network

    network = start(options.pretrained_lora_path)
    layers = {one.lora_name.replace("$$", ".").removeprefix("transformer."): one for one in network.get_all_modules()}

    def delta(path: str) -> torch.Tensor:
        return layers[path].scale * layers[path].lora_up.weight @ layers[path].lora_down.weight

    row: dict[str, Any] = {"loads": True, "step 0": worst(lora, delta)}
    network.save_weights(str(folder / "saved.safetensors"), dtype=torch.float32)
    row["strength"] = strength(lora, folder / "saved.safetensors")
    change(network.named_parameters(), "lora_up")
    network.save_weights(str(folder / "trained.safetensors"), dtype=torch.float32)
    pairs = zip(network.parameters(), start(folder / "trained.safetensors").parameters(), strict=True)
    return {**row, "resumed": all(torch.equal(*pair) for pair in pairs), "version": checkout.name}


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
    """`configure_adapter` and `load_adapter_weights` of its pipeline, and its Saver. DeepSpeed keeps its checkpoints,
    so what is resumed is its own file as `init_from_existing`."""
    sys.path.insert(0, str(checkout))
    from models.qwen_image import QwenImagePipeline
    from utils.saver import Saver

    try:
        import tomllib as toml
    except ModuleNotFoundError:
        import tomli as toml
    folder = Path(told.folder)
    given = toml.loads((folder / "config.toml").read_text(encoding="utf-8"))["adapter"]
    adapter = {**given, "alpha": given["rank"], "dropout": 0.0, "dtype": torch.float32}

    def start(existing: str | Path) -> Any:
        pipe = object.__new__(QwenImagePipeline)
        pipe.transformer = build()
        pipe.configure_adapter(adapter)
        pipe.load_adapter_weights(existing)
        return pipe

    def save(pipe: Any, name: str) -> Path:
        grid = SimpleNamespace(get_data_parallel_rank=lambda: 0, get_pipe_parallel_rank=lambda: 0)
        args, engine = SimpleNamespace(config=str(folder / "config.toml")), SimpleNamespace(grid=grid)
        saver = Saver(args, {}, True, folder.parent / "output", pipe, None, engine, pipe.transformer)
        saver.save_adapter(name)
        return folder.parent / "output" / name

    pipe = start(given["init_from_existing"])
    row: dict[str, Any] = {"loads": True, "step 0": worst(lora, of_peft(pipe.transformer))}
    row["strength"] = strength(lora, save(pipe, "saved") / "adapter_model.safetensors")
    change(pipe.transformer.named_parameters(), "lora_B")
    new = dict(start(save(pipe, "trained")).transformer.named_parameters())
    kept = ((key, value) for key, value in pipe.transformer.named_parameters() if "lora_" in key)
    return {**row, "resumed": all(torch.equal(value, new[key]) for key, value in kept)}


def musubi(lora: Lora, build: Build, told: StartFolder, checkout: Path) -> dict[str, Any]:
    """Its parser, `_build_network`, a step, `--resume` (accelerate's state, in its own order) and `save_weights`."""
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
        yield export(lora, trainer, 9, Path(folder) / "start", stem="style")


def first_implementation(trainer: str, checkout: Path) -> torch.nn.Module:
    """The trainer's own class of FLUX.2, as small as that of `small`."""
    package = "musubi_tuner.flux_2.flux2_models"
    if trainer == "ai-toolkit":
        package = "extensions_built_in.diffusion_models.flux2.src.model"
    sys.path[:0] = [str(checkout), str(checkout / "src")]
    models = importlib.import_module(package)
    sizes = {"in_channels": 16, "context_in_dim": 96, "hidden_size": 128, "num_heads": 4, "depth": 2,
             "depth_single_blocks": 2, "axes_dim": [8, 8, 8, 8], "use_guidance_embed": False}  # fmt: skip
    torch.manual_seed(0)
    return models.Flux2(models.Flux2Params(**sizes))


TRAINERS = {
    "musubi-tuner": musubi, "ai-toolkit": ai_toolkit, "diffsynth": diffsynth, "diffusers": diffusers,
    "simpletuner": simpletuner, "onetrainer": onetrainer, "diffusion-pipe": diffusion_pipe,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("family", choices=("qwen-image", "z-image", "flux2"))
    parser.add_argument("--checkout", type=Path, default=Path())
    args = parser.parse_args()
    stood_in = StandIns(args.checkout)
    arch, build = small(args.family)
    lora = style(arch)
    with started(args.trainer, lora) as told:
        if args.checkout != Path():
            sys.meta_path.append(stood_in)
        if exported.TRAINERS[args.trainer].models[args.family].fused:
            lora, build = fuse(lora), partial(first_implementation, args.trainer, args.checkout)
        row = TRAINERS[args.trainer](lora, build, told, args.checkout)
        print(json.dumps({**row, "stood in": sorted(stood_in.names)}))


if __name__ == "__main__":
    main()
