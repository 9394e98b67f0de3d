"""Every exported file into the consumer it is for: the real one where it can be had, else its contract."""

import argparse
import ast
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings tomli
    tomllib = None

import musubi_contract
from i2l_ext.commands.main import parser
from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.architectures import HIDREAM_O1, KLEIN_4B, MINI, QWEN_IMAGE, Z_IMAGE, flux2, z_image
from i2l_ext.converters.export import export
from i2l_ext.converters.fusing import fuse
from i2l_ext.converters.trainers import TRAINERS, TrainingStart
from i2l_ext.converters.trainers.base import FRESH_ROWS, modules_matching
from i2l_ext.converters.trainers.script import NOT_STARTED
from i2l_ext.requests import ExportRequest
from peers import diffsynth
from test_converters_commands import i2l
from test_converters_consumers import act, base

ARCHS = {arch.family: arch for arch in (QWEN_IMAGE, Z_IMAGE, KLEIN_4B)}
I2L = [arch.family for arch in (QWEN_IMAGE, Z_IMAGE)]
PAIRS = [(trainer.id, family) for trainer in TRAINERS.values() for family in trainer.models if family in ARCHS]


def style(arch, rank=3, paths=None):
    """A LoRA of the first block of each stack, whose ranks fall in size."""
    made = paths or [path for path, module in (arch.i2l_modules or arch.modules).items() if module.block == 0]
    generator = torch.Generator().manual_seed(1)

    def pair(path):
        d_out, d_in = arch.modules[path].shape
        falls = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01][:rank])
        return torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator) * falls

    return Lora.of(arch, {path: pair(path) for path in made})


def is_fused(trainer, arch):
    return TRAINERS[trainer].models[arch.family].fused


def layers(trainer, lora):
    """A LoRA in the layers that the trainer has."""
    return fuse(lora) if is_fused(trainer, lora.arch) else lora


def model_for(trainer, arch):
    """What the trainer trains, at full width and one block of each stack: diffusers' class, or a stand-in for the first
    implementation's. Its memory is reserved and never touched."""
    from test_hooks import small

    if not is_fused(trainer, arch):
        return base(arch.family)
    one = (
        z_image("one", "one", depth=1, refiners=1, hidden=3840, mlp=10240, text=2560)
        if arch is Z_IMAGE
        else flux2("one", "one", depth=1, singles=1, hidden=3072, text=7680)
    )
    with torch.device("meta"):
        model = small("NextDiT" if arch is Z_IMAGE else "Flux2", one.fused)
    return model.to_empty(device="cpu")


def state_of(told):
    return safetensors.torch.load_file(told.init)


def near(found, expected):
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("trainer", "family"), PAIRS)
@pytest.mark.parametrize("rank", [2, 3, 5])
def test_init_file_is_what_every_trainer_needs(tmp_path, trainer, family, rank):
    arch = ARCHS[family]
    lora = layers(trainer, style(arch))
    told = export(style(arch), trainer, rank, tmp_path / "out", stem="style")
    assert (told.modules, told.rank, told.filled, told.left_out) == (len(lora), rank, 0, {})
    state = state_of(told)
    factors = {key: tensor for key, tensor in state.items() if not key.endswith("alpha")}
    assert len(factors) == 2 * len(lora)
    assert all(tensor.dtype == torch.float32 and rank in tensor.shape for tensor in factors.values())
    assert all(tensor == rank for key, tensor in state.items() if key.endswith("alpha"))
    written = layers(trainer, Lora.read(told.init))
    for path in lora:
        down, up = written[path]
        given = lora.specs[path].rank  # 3, or of a fused layer 9
        fresh = math.sqrt(down.shape[1]) / rank if TRAINERS[trainer].fresh_rows == "gaussian" else 3**-0.5
        norms = up.norm(dim=0)[:given].clamp(min=3**-0.5)  # as long as the columns of up
        assert torch.allclose(down[:given].norm(dim=1), norms, rtol=1e-3)
        assert torch.allclose(down[given:].norm(dim=1), torch.full((rank - min(rank, given),), fresh), rtol=0.1)
        if rank >= given:
            assert near(act(down, up), act(*lora[path]))
    assert written.metadata["i2l.rank_seed"] == "0"
    assert written.metadata["i2l.fresh_rows"] == told.fresh_rows == TRAINERS[trainer].fresh_rows
    assert told.run == "train.py" and told.run in told.files
    written = [Path(told.init).name, *told.files, "README.md"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(written)
    assert len((tmp_path / "out" / "README.md").read_text().splitlines()) <= 28


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_the_authors_say_of_memory_stands_in_the_docs(trainer):
    text = (Path(__file__).parent.parent / "docs/trainers.md").read_text(encoding="utf-8")
    assert all(said in text for said in TRAINERS[trainer].memory.values())


def test_the_flags_that_save_memory_are_told_with_their_command(tmp_path):
    """musubi-tuner's guides: `--fp8_vl` and `--fp8_llm` are for the text encoder, whose outputs the second caches."""
    for arch, text_encoder in ((QWEN_IMAGE, "--fp8_vl"), (Z_IMAGE, "--fp8_llm")):
        export(style(arch), "musubi-tuner", 2, tmp_path / arch.id)
        [line] = [one for one in (tmp_path / arch.id / "README.md").read_text().splitlines() if "Memory" in one]
        assert "--fp8_base --fp8_scaled" in line
        assert f"in the second `{text_encoder}`" in line or f"`{text_encoder}` in the second" in line


@pytest.mark.parametrize(
    ("trainer", "saves"),
    [
        ("musubi-tuner", ["'--max_train_epochs', '16'", "'--save_every_n_epochs', '1'"]),
        ("ai-toolkit", ["save_every: 125, max_step_saves_to_keep: 16", "steps: 2000"]),
        ("simpletuner", ['"checkpoint_step_interval": 125', '"checkpoints_total_limit": 16']),
        ("onetrainer", ['"epochs": 50', '"save_every": 3', '"save_every_unit": "EPOCH"']),
        ("diffusion-pipe", ["epochs = 50", "save_every_n_epochs = 3"]),
        ("diffsynth", ["'--num_epochs', '16'"]),
        ("diffusers", ["'--max_train_steps', '2000'", "'--checkpointing_steps', '125'"]),
        ("flymyai", ["checkpointing_steps: 125", "checkpoints_total_limit: 16"]),
    ],
)
def test_a_run_saves_sixteen_times_and_keeps_all_of_that(tmp_path, trainer, saves):
    """SimpleTuner keeps five unless it is told another number, ai-toolkit four."""
    told = export(style(QWEN_IMAGE), trainer, 2, tmp_path / "out")
    texts = "\n".join((tmp_path / "out" / name).read_text(encoding="utf-8") for name in told.files)
    assert [one for one in saves if one not in texts] == []


FRESH_RATES = {("musubi-tuner", "qwen-image"): 5e-5} | {("diffusion-pipe", family): 5e-5 for family in ARCHS}
"""What the guides of trainers advise for a fresh LoRA, where that is not 1e-4."""


@pytest.mark.parametrize(("trainer", "family"), PAIRS)
def test_the_files_have_a_third_of_a_fresh_rate_and_the_readme_says_where(tmp_path, trainer, family):
    told = export(style(ARCHS[family]), trainer, 2, tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    rate, file, name = re.search(r"begin with (\S+), which stands in `(.*?)` as `(.*?)`", readme).groups()
    values = re.findall(rf"\b{name.lstrip('-')}\W+(\d\S*\d)", (tmp_path / "out" / file).read_text())
    assert values == [rate] and float(rate) == told.learning_rate
    assert 3 * told.learning_rate == pytest.approx(FRESH_RATES.get((trainer, family), 1e-4), rel=0.03)


# the texts


STUB = """import json, os, sys
with open(os.environ["SEEN"], "a", encoding="utf-8") as file:
    print(json.dumps(sys.argv), file=file)
"""


def lay_out(script, work):
    """The trainer's programs that a train.py calls, in its folder; they do nothing."""
    for program in re.findall(r"'(\w\S*\.py)'", script.read_text(encoding="utf-8")):
        (work / program).parent.mkdir(parents=True, exist_ok=True)
        (work / program).touch()


def write_launcher(work, text):
    """A package of accelerate's name where `python -m` looks first."""
    (work / "accelerate/commands").mkdir(parents=True)
    for name in ("__init__.py", "commands/__init__.py", "commands/launch.py"):
        (work / "accelerate" / name).write_text(text if name.endswith("launch.py") else "")


def run_script(script, work):
    """Run an exported train.py as a user does, with stand-ins for the programs that it calls: the arguments that each
    of them was given, its own name first. The places to fill in are there."""
    text = script.read_text(encoding="utf-8")
    for place in re.findall(r"^\w+ = '(path/to/[^']*)'", text, re.MULTILINE):
        (work / place).parent.mkdir(parents=True, exist_ok=True)
        (work / place).touch() if "." in place else (work / place).mkdir(exist_ok=True)
    for data in script.parent.glob("dataset.toml"):
        data.write_text(data.read_text(encoding="utf-8").replace("path/to/dataset", "pictures"), encoding="utf-8")
    for program in re.findall(r"'(\S+\.py)'", text):
        (work / program).parent.mkdir(parents=True, exist_ok=True)
        (work / program).write_text(STUB)
    write_launcher(work, STUB)
    environment = os.environ | {"SEEN": str(work / "seen")}
    done = subprocess.run([sys.executable, script], cwd=work, env=environment, capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, b"")
    return [launched(json.loads(line)) for line in (work / "seen").read_text(encoding="utf-8").splitlines()]


def launched(words):
    """What a program got; by `accelerate launch`, whose own parser says where its own options end."""
    if not words[0].endswith("launch.py"):
        return words
    from accelerate.commands.launch import launch_command_parser

    given = launch_command_parser().parse_args(words[1:])
    return [given.training_script, *given.training_script_args]


def parsed(script, work):
    """The arguments of each program that train.py starts, read by its own parser: {name of the program: namespace}."""
    return {
        Path(program).name: parser_of(program).parse_args(arguments) for program, *arguments in run_script(script, work)
    }


def parser_of(program):
    if "musubi_tuner" in program:
        return musubi_contract.parser(Path(program).name)
    parsers = diffsynth("diffusion.parsers")
    parser = parsers.add_image_size_config(parsers.add_general_config(argparse.ArgumentParser()))
    for option in ("--tokenizer_path", "--processor_config", "--noise_scale"):
        parser.add_argument(option)  # of the training scripts themselves (examples/*/model_training/train.py)
    return parser


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


FILES_NAMED = {"qwen-image": "qwen_image_bf16.safetensors of Comfy-Org", "z-image": "of Comfy-Org/z_image"}
"""What musubi-tuner's guides call the transformer's file."""


@pytest.mark.parametrize(("trainer", "family"), [("musubi-tuner", f) for f in I2L] + [("diffsynth", f) for f in ARCHS])
def test_a_script_with_an_unknown_place_says_so(tmp_path, work, trainer, family):
    told = export(style(ARCHS[family]), trainer, 2, tmp_path / "out")
    lay_out(tmp_path / "out" / "train.py", work)
    done = subprocess.run([sys.executable, tmp_path / "out" / "train.py"], cwd=work, capture_output=True, text=True)
    assert done.returncode == NOT_STARTED
    said = done.stderr.splitlines()
    [title] = [line for line in said if str(tmp_path / "out/train.py") in line]
    assert title == f"Fill in these paths at the top of {tmp_path / 'out/train.py'}:"
    said.remove(title)
    for line in said:
        assert re.fullmatch(
            r"[A-Z]+: path/to/.*: no such file or folder( \(.+\))?"
            r"|.*dataset\.toml, line \d+: fill in this path: image_directory = \"path/to/dataset\"", line
        )  # fmt: skip
    if trainer == "musubi-tuner":
        hint = FILES_NAMED[family]
        assert f"DIT: path/to/transformer.safetensors: no such file or folder ({hint}" in done.stderr
    blanks = [blank for blanks in told.blanks.values() for blank in blanks]  # all at once, and export has told them
    assert all(any(blank in line for line in said) for blank in blanks)
    assert len(said) == len(blanks) == (4 if trainer == "musubi-tuner" else 2)


def test_a_script_ends_as_its_program_does(tmp_path, work):
    export(style(QWEN_IMAGE), "diffsynth", 2, tmp_path / "out")
    (work / "path/to/dataset").mkdir(parents=True)
    (work / "path/to/dataset/metadata.csv").touch()
    lay_out(tmp_path / "out" / "train.py", work)
    write_launcher(work, "raise SystemExit(7)")
    assert subprocess.run([sys.executable, tmp_path / "out" / "train.py"], cwd=work, check=False).returncode == 7


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_script_in_the_wrong_folder_or_the_wrong_python_says_so(tmp_path, work, trainer):
    """`-S`: a Python without the packages that are installed."""
    family = next(family for family in TRAINERS[trainer].models if family in ARCHS)
    export(style(ARCHS[family]), trainer, 2, tmp_path / "out", pictures={"1.png": Image.new("RGB", (8, 8)).save})
    script = tmp_path / "out" / "train.py"
    done = subprocess.run([sys.executable, "-S", script], cwd=work, capture_output=True, text=True)
    assert done.returncode == NOT_STARTED and "Traceback" not in done.stderr
    text = script.read_text(encoding="utf-8")
    own = re.findall(r"sys\.executable, '(\w\S*\.py)'|'(\w\S*/train\S*\.py)'", text)
    assert all(f"{''.join(one)} is not in this folder: run this in that of" in done.stderr for one in own)
    packages = re.findall(r"sys\.executable, '-m', '(\w+)", text)
    assert all(re.search(rf"{package} is not in .*: run this with the Python of", done.stderr) for package in packages)
    assert own or packages


FILES = {
    "qwen": (QWEN_IMAGE, None, 12, r"exclude_patterns=\['\.\*mlp\[\.\]net\[\.\]0\.\*'\]"),
    "qwen attention only": (QWEN_IMAGE, r"transformer_blocks\.0\.attn\..*", 8, r"img_mod"),
    "z": (Z_IMAGE, None, 21, r"include_patterns=\['\.\*_refiner\.\*\(attention\|feed_forward\)\.\*'\]"),
    "z main": (Z_IMAGE, r"layers\.0\.(attention|feed_forward).*", 7, None),
    "z modulation": (Z_IMAGE, r"layers\.0\..*", 8, r"adaLN_modulation"),
    "klein": (KLEIN_4B, None, 10, None),
    "klein attention only": (KLEIN_4B, r"transformer_blocks\.0\.attn\..*", 4, r"img_mlp\[\.\]0"),
}


def chosen(name):
    arch, pattern, _, _ = FILES[name]
    paths = [path for path in arch.modules if re.fullmatch(pattern, path)] if pattern else None
    return arch, style(arch, paths=paths)


@pytest.mark.parametrize("name", FILES)
def test_musubi_loads_all_and_trains_nothing_else(tmp_path, work, name):
    arch, lora = chosen(name)
    _, _, count, flag = FILES[name]
    told = export(lora, "musubi-tuner", 9, tmp_path / "out")
    lora = layers("musubi-tuner", lora)
    programs = parsed(tmp_path / "out" / "train.py", work)
    assert len(programs) == 3
    args = next(given for program, given in programs.items() if program.endswith("train_network.py"))
    assert flag is None or re.search(flag, " ".join(args.network_args))
    assert "\\" not in " ".join(args.network_args or ())  # Python 3.12 warns of an escape that is none
    assert args.network_dim == args.network_alpha == 9
    assert (args.network_weights, args.output_name) == (told.init, told.name)
    assert getattr(args, "model_version", None) in ("original", "klein-base-4b") or arch is Z_IMAGE
    unet = model_for("musubi-tuner", arch)
    kind = args.network_module.removeprefix("networks.")
    options = dict(argument.split("=") for argument in args.network_args or ())
    network = musubi_contract.network_module(kind)(1.0, 9, 9.0, None, None, unet, **options)
    network.apply_to(None, unet)
    assert len(network.unet_loras) == count
    outcome = network.load_weights(told.init)
    assert outcome.missing_keys == outcome.unexpected_keys == []
    by_name = {module.lora_name: module for module in network.unet_loras}
    for path in lora:
        module = by_name["lora_unet_" + path.replace(".", "_")]
        assert near(module.scale * act(module.lora_down.weight, module.lora_up.weight), act(*lora[path]))


def ai_toolkit_modules(config, unet, block_names):
    """The layers that ai-toolkit wraps, by its documented rules, with the names that its files have."""
    network = config["config"]["process"][0]["network"]
    kwargs = network.get("network_kwargs", {})
    names = []
    for name, layer in unet.named_modules():
        clean = f"transformer.{name}"
        if type(layer).__name__ != "Linear" or any(word in clean for word in kwargs.get("ignore_if_contains", [])):
            continue
        if network.get("transformer_only", True) and not any(block in clean for block in block_names):
            continue
        only = kwargs.get("only_if_contains")
        if only is None or any(word in clean for word in only):
            names.append(name)
    return names


AI_TOOLKIT_BLOCKS = {
    "qwen-image": ["transformer_blocks"], "z-image": ["layers"], "flux2": ["double_blocks", "single_blocks"],
}  # fmt: skip
"""`get_transformer_block_names` of its models."""


@pytest.mark.parametrize("name", FILES)
def test_ai_toolkit_loads_all_and_trains_nothing_else(tmp_path, name):
    arch, lora = chosen(name)
    told = export(lora, "ai-toolkit", 9, tmp_path / "out")
    lora = layers("ai-toolkit", lora)
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    network = config["config"]["process"][0]["network"]
    assert network["linear"] == network["linear_alpha"] == 9
    assert network["pretrained_lora_path"] == told.init and Path(told.init).is_absolute()
    assert config["config"]["name"] == told.name
    names = ai_toolkit_modules(config, model_for("ai-toolkit", arch), AI_TOOLKIT_BLOCKS[arch.family])
    keys = {f"diffusion_model.{name}.lora_{side}.weight" for name in names for side in "AB"}
    state = state_of(told)
    if name in ("z main", "z modulation"):  # it chooses by pieces of names, so the refiners come too, and start fresh
        assert set(state) <= keys
    else:
        assert set(state) == keys
    for path in lora:
        down, up = state[f"diffusion_model.{path}.lora_A.weight"], state[f"diffusion_model.{path}.lora_B.weight"]
        assert near(act(down, up), act(*lora[path]))  # its scale is 1


def test_a_fused_layer_keeps_all_at_the_sum_of_the_ranks(tmp_path):
    """FLUX.2 of musubi-tuner and ai-toolkit: q, k and v are one layer, so that is the rank unless another is asked for,
    which takes the nearest update."""
    lora = style(KLEIN_4B, paths=[f"transformer_blocks.0.attn.to_{part}" for part in "qkv"])
    for trainer, key_format in (("musubi-tuner", "kohya-fused"), ("ai-toolkit", "webui-fused")):
        whole = export(lora, trainer, None, tmp_path / trainer / "whole")
        assert (whole.rank, whole.modules, whole.key_format, whole.kept["all"]) == (9, 1, key_format, 1)
        asked = export(lora, trainer, 4, tmp_path / trainer / "asked")
        assert asked.rank == 4 and 0.9 < asked.kept["all"] < 0.99 and asked.error < 1e-5
        back = Lora.read(whole.init)
        assert list(back) == list(lora) and all(near(act(*back[path]), act(*lora[path])) for path in lora)


def test_a_folder_of_diffusers_is_no_model_as_first_implemented(tmp_path):
    """musubi-tuner and ai-toolkit read FLUX.2 as first implemented, which a folder of diffusers has not."""
    lora = style(KLEIN_4B, paths=["transformer_blocks.0.attn.to_q"])
    home = tmp_path / "klein"
    bases = {part: home / part / "model.safetensors" for part in ("transformer", "vae", "text_encoder")}
    bases["folder"] = home
    home.mkdir()
    told = export(lora, "musubi-tuner", 4, tmp_path / "musubi", bases=bases)
    assert told.bases == {"text_encoder": str(bases["text_encoder"])}
    assert "DIT = 'path/to/" in (tmp_path / "musubi/train.py").read_text()
    for there in (False, True):
        if there:
            (home / "flux-2-klein-base-4b.safetensors").touch()
        folder = tmp_path / f"ai-{there}"
        told = export(lora, "ai-toolkit", 4, folder, bases=bases)
        model = yaml.safe_load((folder / "config.yaml").read_text())["config"]["process"][0]["model"]
        name = home.as_posix() if there else "black-forest-labs/FLUX.2-klein-base-4B"
        assert model["name_or_path"] == name and model["arch"] == "flux2_klein_4b"
        assert told.bases == ({"folder": str(home)} if there else {})


def diffsynth_training():
    """DiffSynth-Studio's own training module. What else its file imports is not used, and not installed here."""
    diffsynth("utils")  # the package itself
    for name, names in {
        "core": ("ModelConfig", "load_state_dict", "QuantizeConfig"),
        "core.quant": ("MixedQuantizeConfig",),
        "utils.controlnet": ("ControlNetInput",),
        "diffusion.base_pipeline": ("PipelineUnit",),
    }.items():
        module = sys.modules.setdefault(f"peer_diffsynth.{name}", types.ModuleType(f"peer_diffsynth.{name}"))
        for one in names:  # other tests may have loaded a part of it
            module.__dict__.setdefault(one, type(one, (), {}))
    return diffsynth("diffusion.training_module").DiffusionTrainingModule()


@pytest.mark.parametrize(
    ("family", "only"),
    [
        ("qwen-image", None),
        ("z-image", None),
        ("flux2", None),
        ("qwen-image", "attn.to_q"),
        ("qwen-image", "img_mod.1"),
        ("z-image", "w2"),
    ],
)
def test_diffsynth_loads_all_by_its_own_code(tmp_path, work, family, only):
    """Its parser, its targets, its loader and its mapping into a PEFT model; also where there is one kind of layer."""
    lora = style(ARCHS[family])
    if only:
        lora = style(ARCHS[family], paths=[path for path in lora if path.endswith(only)])
    told = export(lora, "diffsynth", 5, tmp_path / "out")
    args = parsed(tmp_path / "out" / "train.py", work)["train.py"]
    assert (args.lora_rank, args.lora_checkpoint) == (5, told.init)
    assert args.output_path.endswith(told.name)
    assert 8 * args.dataset_repeat * args.num_epochs >= 1000
    module = diffsynth_training()
    targets = module.parse_lora_target_modules(None, args.lora_target_modules)
    model = module.add_lora_to_model(base(family), targets, args.lora_rank)
    state = diffsynth("utils.lora.general").GeneralLoRALoader().convert_state_dict(state_of(told))
    outcome = model.load_state_dict(module.mapping_lora_state_dict(state), strict=False)
    assert outcome.unexpected_keys == []
    assert {name for name, layer in model.named_modules() if hasattr(layer, "lora_A")} == set(lora.specs)
    assert [key for key in outcome.missing_keys if "lora_" in key] == []
    for path in lora:
        layer = model.get_submodule(path)
        found = layer.scaling["default"] * act(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        assert near(found, act(*lora[path]))


def test_diffsynth_trains_hidream_in_the_layers_of_its_class(tmp_path, work):
    """The whole class, without memory for its weights: which layers its parser and PEFT choose, and which keys load."""
    from test_converters_architectures import hidream

    paths = [path for path in HIDREAM_O1.modules if re.search(r"language_model.*(q|v)_proj", path)]
    lora = style(HIDREAM_O1, paths=paths)
    told = export(lora, "diffsynth", 5, tmp_path / "out")
    args = parsed(tmp_path / "out" / "train.py", work)["train.py"]
    assert args.model_id_with_origin_paths.startswith("HiDream-ai/HiDream-O1-Image:")
    assert args.max_pixels == 4 << 20
    module = diffsynth_training()
    with torch.device("meta"):
        whole = hidream()
        model = module.add_lora_to_model(whole, module.parse_lora_target_modules(None, args.lora_target_modules), 5)
    assert {name for name, layer in model.named_modules() if hasattr(layer, "lora_A")} == set(lora.specs)
    state = diffsynth("utils.lora.general").GeneralLoRALoader().convert_state_dict(state_of(told))
    mapped = module.mapping_lora_state_dict(state)
    assert mapped.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(("trainer", "family"), [pair for pair in PAIRS if pair[0] in ("diffusers", "flymyai")])
def test_the_written_script_sets_the_real_class(tmp_path, trainer, family, capsys):
    lora = style(ARCHS[family])
    export(lora, trainer, 5, tmp_path / "out")
    scope = {}
    exec((tmp_path / "out" / "start.py").read_text(), scope)  # noqa: S102 - our own text, as a user runs it
    model = base(family)
    scope["start"](model)
    assert f"{len(lora)} modules start from" in capsys.readouterr().out
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(lora.specs)
    for path in lora:
        layer = model.get_submodule(path)
        found = layer.scaling["default"] * act(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        assert near(found, act(*lora[path]))


def test_diffusers_loads_the_init_file(tmp_path):
    from test_converters_consumers import diffusers_loads

    for family, arch in ARCHS.items():
        lora = style(arch)
        told = export(lora, "diffusers", 5, tmp_path / family)
        assert diffusers_loads(family, state_of(told), Lora.read(told.init)) == len(lora)


# fresh capacity


@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_step_moves_every_rank(tmp_path, trainer):
    from test_converters_rank import gradients

    lora = style(MINI, rank=2)
    told = export(lora, trainer, 6, tmp_path / "out")
    written = Lora.read(told.init)
    for path in list(written)[:3]:
        assert all(gradients(*written[path]))


@pytest.mark.parametrize("family", ["qwen-image", "z-image"])
def test_what_the_file_lacks_is_told_and_filled(tmp_path, family):
    arch = ARCHS[family]
    lora = style(
        arch, paths=[path for path in arch.i2l_modules if arch.modules[path].block == 0 and "to_q" not in path]
    )
    told = export(lora, "musubi-tuner", 4, tmp_path / "a")
    first = "attn.to_k" if family == "qwen-image" else "attention.to_k"
    assert told.fresh[first] == sum(stack.depth - 1 for stack in arch.stacks)
    readme = (tmp_path / "a" / "README.md").read_text()
    assert "The trainer starts these without an update" in readme
    lacking = first.replace("to_k", "to_q")
    default = modules_matching(arch, TRAINERS["musubi-tuner"].models[family].default)
    assert told.untrained[lacking] == sum(arch.modules[path].kind.name == lacking for path in default)
    assert f"Not trained, because the LoRA lacks them: {told.untrained[lacking]} {lacking}" in readme
    small = style(MINI, paths=[path for path in MINI.i2l_modules if "to_q" not in path])
    filled = export(small, "musubi-tuner", 4, tmp_path / "b", fill=True)
    assert filled.filled == 3 * MINI.stacks[0].depth and filled.fresh == {}
    written = Lora.read(filled.init)
    down, up = written["transformer_blocks.1.attn.to_q"]
    assert not up.any() and down.any(dim=1).all()
    assert "--network_args" not in (tmp_path / "b" / "train.py").read_text()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("fill", [False, True])
def test_the_read_me_knows_all_that_is_trained(tmp_path, trainer, name, fill):
    """What the written flags choose, by the trainer's own rules, is in the file or told; with --fill it is in the file,
    also layers of a filled kind that the trainer does not train by default."""
    arch, lora = chosen(name)
    if arch.family not in TRAINERS[trainer].models:
        return
    told = export(lora, trainer, 2, tmp_path / "out", fill=fill)
    written = Lora.read(told.init)
    unet = model_for(trainer, arch)
    chosen_by_rules = RULES[trainer](tmp_path / "out", unet)
    written = fuse(written) if is_fused(trainer, arch) else written
    start = TrainingStart(layers(trainer, lora).arch, Path(told.init), told.name, 2, 0, tuple(written))
    trained = TRAINERS[trainer].models[arch.family].trained(start)
    assert {path for path in trained if path in dict(unet.named_modules())} == {*chosen_by_rules}
    if fill:
        assert {*chosen_by_rules} <= {*written.specs} and told.fresh == {}
        assert "without an update" not in (tmp_path / "out" / "README.md").read_text()
    else:
        assert sum(told.fresh.values()) == len({*trained} - {*written.specs})
    default = modules_matching(start.arch, TRAINERS[trainer].models[arch.family].default)
    assert sum(told.untrained.values()) == len({*default} - {*trained} - {*written.specs})


def musubi_rules(folder, unet):
    text = (folder / "train.py").read_text()
    options = dict(
        ast.literal_eval(word).split("=")
        for word in re.findall(r"""(?:'|")(?:in|ex)clude_patterns.*?\](?:'|")""", text)
    )
    kind = re.search(r"networks\.(\w+)", text)[1]
    network = musubi_contract.network_module(kind)(1.0, 2, 2.0, None, None, unet, **options)
    names = {name.replace(".", "_"): name for name, _ in unet.named_modules()}
    return [names[module.lora_name.removeprefix("lora_unet_")] for module in network.unet_loras]


def ai_toolkit_rules(folder, unet):
    blocks = next(blocks for blocks in AI_TOOLKIT_BLOCKS.values() if all(hasattr(unet, block) for block in blocks))
    return ai_toolkit_modules(yaml.safe_load((folder / "config.yaml").read_text()), unet, blocks)


def peft_rules(folder, unet):
    from peft import LoraConfig, inject_adapter_in_model

    text = (folder / "start.py").read_text()
    targets = ast.literal_eval(re.search(r"^TARGETS = (.*)$", text, re.MULTILINE)[1])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), unet)
    return [name for name, layer in unet.named_modules() if hasattr(layer, "lora_A")]


def diffsynth_rules(folder, unet):
    text = (folder / "train.py").read_text()
    targets = ast.literal_eval(re.search(r"'--lora_target_modules', ('.*'),$", text, re.MULTILINE)[1])
    module = diffsynth_training()
    module.add_lora_to_model(unet, module.parse_lora_target_modules(None, targets), 2)
    return [name for name, layer in unet.named_modules() if hasattr(layer, "lora_A")]


def simpletuner_rules(folder, unet):
    from peft import LoraConfig, inject_adapter_in_model

    targets = read_config(folder / "config.json")["peft_lora_target_modules"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), unet)
    return [name for name, layer in unet.named_modules() if hasattr(layer, "lora_A")]


def onetrainer_rules(folder, unet):
    """Its filter: one of the patterns between commas is found in the name."""
    patterns = [pattern.strip() for pattern in read_config(folder / "config.json")["layer_filter"].split(",")]
    return [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and any(re.search(pattern, name) for pattern in patterns)
    ]


def diffusion_pipe_rules(folder, unet):
    """All linear layers of the blocks, by their whole names, less what is excluded."""
    from peft import LoraConfig, inject_adapter_in_model

    adapter = read_config(folder / "config.toml")["adapter"]
    kinds = ("QwenImageTransformerBlock", "JointTransformerBlock", "DoubleStreamBlock", "SingleStreamBlock")
    blocks = {name: block for name, block in unet.named_modules() if type(block).__name__ in kinds}
    linear = [
        f"{name}.{child}"
        for name, block in blocks.items()
        for child, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    options = {"target_modules": linear, "exclude_modules": adapter.get("exclude_modules")}
    inject_adapter_in_model(LoraConfig(r=adapter["rank"], **options), unet)
    return [name for name, layer in unet.named_modules() if hasattr(layer, "lora_A")]


def configuration(folder):
    """The trainer's own configuration in a start folder; None where it has none."""
    return next(folder.glob("config.*"), None)


def read_config(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return (tomllib or importlib.import_module("tomli")).loads(text)
    return json.loads(text)


@pytest.mark.parametrize(("trainer", "family"), [(t, f) for t, f in PAIRS if t in ("simpletuner", "diffusion-pipe")])
def test_their_loaders_find_a_place_for_every_key(tmp_path, trainer, family):
    """The prefix goes, ``.default`` comes, and what is left must be a parameter; no alpha is taken."""
    lora = layers(trainer, style(ARCHS[family]))
    told = export(style(ARCHS[family]), trainer, 5, tmp_path / "out")
    model = model_for(trainer, ARCHS[family])
    RULES[trainer](tmp_path / "out", model)
    config = read_config(configuration(tmp_path / "out"))
    if trainer == "simpletuner":
        assert (config["lora_rank"], config["lora_alpha"], config["init_lora"]) == (5, 5, told.init)
    else:
        assert config["adapter"]["rank"] == 5 and "alpha" not in config["adapter"]
        assert [*Path(config["adapter"]["init_from_existing"]).glob("*.safetensors")] == [Path(told.init)]
    parameters = {name for name, _ in model.named_parameters()}
    keys = {re.sub(r"^(transformer|diffusion_model)\.", "", key) for key in state_of(told)}
    keys = {key.replace(".weight", ".default.weight") for key in keys}
    assert keys <= parameters and len(keys) == 2 * len(lora)


@pytest.mark.parametrize("name", FILES)
def test_onetrainers_filter_chooses_what_is_in_the_file_and_nothing_else(tmp_path, name):
    """It raises where a chosen layer has no key; also where only some blocks are in the file."""
    arch, lora = chosen(name)
    told = export(lora, "onetrainer", 5, tmp_path / "out")
    config = read_config(tmp_path / "out" / "config.json")
    assert (config["lora_rank"], config["lora_alpha"], config["lora_model_name"]) == (5, 5, told.init)
    assert "," not in config["layer_filter"] and config["layer_filter_regex"] is True and told.fresh == {}
    paths = [path for path in arch.modules if re.search(config["layer_filter"], path)]
    assert sorted(paths) == sorted(lora)


RULES = {
    "simpletuner": simpletuner_rules, "onetrainer": onetrainer_rules, "diffusion-pipe": diffusion_pipe_rules,
    "musubi-tuner": musubi_rules, "ai-toolkit": ai_toolkit_rules, "diffsynth": diffsynth_rules,
    "diffusers": peft_rules, "flymyai": peft_rules,
}  # fmt: skip


@pytest.mark.parametrize(("how", "init"), [("kaiming", True), ("gaussian", "gaussian")])
@pytest.mark.parametrize("rank", [4, 16])
def test_fresh_rows_are_as_long_as_pefts_own(how, init, rank):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3840, 8))
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=["0"], init_lora_weights=init), model)
    norms = model[0].lora_A["default"].weight.detach().norm(dim=1)
    assert float(norms.mean()) == pytest.approx(FRESH_ROWS[how](3840, rank), rel=0.02)


@pytest.mark.parametrize(("trainer", "family"), [pair for pair in PAIRS if pair[0] in ("diffusers", "flymyai")])
def test_start_py_needs_no_hub_and_says_what_it_is_for(tmp_path, trainer, family, monkeypatch):
    import diffusers

    told = export(style(ARCHS[family]), trainer, 4, tmp_path / "out")
    script = tmp_path / "out" / "start.py"
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "fill in the paths" not in readme and "from start import start" in readme
    assert f"is called `{told.name}`" not in readme and readme.count(told.name) == 1  # where the run saves
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and f"{told.modules} modules of rank 4" in done.stdout
    assert "in place of `add_adapter(...)`" in done.stdout

    def offline(*args, **kwargs):
        raise ValueError("When using the offline mode, you must specify a `weight_name`.")  # diffusers 0.35

    for pipeline in (diffusers.QwenImagePipeline, diffusers.ZImagePipeline):
        monkeypatch.setattr(pipeline, "lora_state_dict", offline)
    scope = {"__name__": "start"}
    exec(script.read_text(), scope)  # noqa: S102 - our own text, as a user runs it
    model = base(family)
    scope["start"](model)
    assert sum(hasattr(layer, "lora_A") for layer in model.modules()) == told.modules


SCRIPT = """
import sys
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig
from beside import CONFIG  # a module beside the script
transformer = QwenImageTransformer2DModel(**CONFIG)
if "--none" not in sys.argv:
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
print(len([1 for layer in transformer.modules() if hasattr(layer, "lora_A")]), sys.argv[1:])
"""


@pytest.mark.parametrize("trainer", ["diffusers", "flymyai"])
def test_start_py_runs_a_training_script_as_it_is(tmp_path, trainer):
    """Its adapter is ours, and a script that adds none is told of."""
    from i2l_ext.mini.base import TRANSFORMER_CONFIG

    told = export(style(MINI), trainer, 4, tmp_path / "out")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/train.py").write_text(SCRIPT)
    (tmp_path / "work/beside.py").write_text(f"CONFIG = {TRANSFORMER_CONFIG!r}")
    words = [sys.executable, tmp_path / "out/start.py", tmp_path / "work/train.py", "--config", "x"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    first, last = done.stdout.splitlines()
    assert done.returncode == 0 and first.startswith(f"{told.modules} modules start from")
    assert last.endswith("['--config', 'x']") and int(last.split()[0]) >= told.modules > 2
    done = subprocess.run([*words, "--none"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "has added no adapter" in done.stderr


def test_the_effect_kept_of_all_modules_stands_last(tmp_path):
    told = export(style(MINI), "musubi-tuner", 2, tmp_path / "out")
    assert [*told.kept][-1] == "all" and len(told.kept) > 2


def test_a_lora_saved_by_diffusers_is_known_by_its_maker(tmp_path):
    from diffusers import QwenImagePipeline
    from peft import LoraConfig, get_peft_model_state_dict

    from i2l_ext.converters.inspection import inspect

    model = base("qwen-image")
    config = LoraConfig(r=2, target_modules=["to_q"])
    model.add_adapter(config)
    state = get_peft_model_state_dict(model)
    QwenImagePipeline.save_lora_weights(tmp_path / "plain", state)
    QwenImagePipeline.save_lora_weights(tmp_path / "told", state, transformer_lora_adapter_metadata=config.to_dict())
    makers = {name: inspect(next((tmp_path / name).iterdir())).maker for name in ("plain", "told")}
    assert makers == {"plain": "diffusers, a trainer built on it or a converter", "told": "diffusers"}


@pytest.mark.parametrize("name", ["kohya", "diffusers", "diffsynth", "webui"])
def test_what_a_converter_wrote_is_not_told_as_made_by_a_trainer(tmp_path, name):
    from i2l_ext.converters.inspection import inspect

    style(QWEN_IMAGE, paths=["transformer_blocks.0.attn.to_q"]).save(tmp_path / "plain.safetensors", "diffsynth")
    assert (
        i2l("convert", str(tmp_path / "plain.safetensors"), "--to", name, "-o", str(tmp_path / "new.safetensors")) == 0
    )
    maker = inspect(tmp_path / "new.safetensors").maker
    assert maker is None or maker.endswith(" or a converter")


def test_modules_without_a_place_are_told(tmp_path):
    lora = style(MINI, paths=["proj_out", *MINI.i2l_modules])
    told = export(lora, "musubi-tuner", 4, tmp_path / "out")
    assert told.left_out == {"proj_out": 1}
    assert "Left out, because it cannot train them: 1 proj_out." in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="cannot train any module"):
        export(style(MINI, paths=["proj_out"]), "musubi-tuner", 4, tmp_path / "none")
    assert not (tmp_path / "none").exists()


# wrong input


def test_wrong_orders(tmp_path):
    lora = style(MINI)
    with pytest.raises(UserError, match="There are: musubi-tuner"):
        export(lora, "nonsense", 4, tmp_path / "x")
    with pytest.raises(
        UserError, match=r"No start folder is written for Z-Image with flymyai-lora-trainer, only for qwen"
    ):
        export(style(Z_IMAGE), "flymyai", 4, tmp_path / "x")
    with pytest.raises(UserError, match=r"No start folder is written for HiDream"):
        export(style(HIDREAM_O1), "diffusion-pipe", 4, tmp_path / "x")
    with pytest.raises(UserError, match="from 1 to 4096"):
        export(lora, "diffusers", 0, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        export(lora, "diffusers", 4, tmp_path / "file")


def test_nan_leaves_no_folder(tmp_path):
    lora = style(MINI)
    lora[next(iter(lora))][0][0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        export(lora, "diffusers", 4, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(tmp_path):
    lora = style(MINI)
    export(lora, "ai-toolkit", 4, tmp_path / "x")
    first = (tmp_path / "x" / "config.yaml").read_text()
    with pytest.raises(UserError, match="exists already"):
        export(lora, "ai-toolkit", 4, tmp_path / "x")
    assert (tmp_path / "x" / "config.yaml").read_text() == first
    again = export(lora, "ai-toolkit", 4, tmp_path / "x", overwrite=True)
    assert again.name in (tmp_path / "x" / "config.yaml").read_text() and again.name not in first
    assert (tmp_path / "x" / "config.yaml.old").read_text() == first, "what a user may have changed"
    assert sorted(path.name for path in (tmp_path / "x").glob("*.old")) == ["config.yaml.old", "train.py.old"]


def test_paths_that_were_filled_in_are_kept_when_a_start_is_written_anew(tmp_path):
    """Not those of the start folder itself, whose names change with the rank."""
    lora = style(QWEN_IMAGE, paths=["transformer_blocks.0.attn.to_q"])
    folder, script = tmp_path / "x", tmp_path / "x/train.py"
    export(lora, "musubi-tuner", 4, folder)
    text = script.read_text(encoding="utf-8")
    text = text.replace("DIT = 'path/to/transformer.safetensors'", "DIT = r'D:\\models\\my dit.safetensors'")
    script.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="--overwrite: it replaces the files of the start there"):
        export(lora, "musubi-tuner", 8, folder)
    told = export(lora, "musubi-tuner", 8, folder, overwrite=True)
    text = script.read_text(encoding="utf-8")
    assert r"DIT = 'D:\\models\\my dit.safetensors'" in text and "VAE = 'path/to/" in text
    assert f"INIT = {told.init!r}" in text and told.init.endswith("_r8.safetensors")
    assert "path/to/transformer.safetensors" not in told.to_fill_in and "path/to/vae" in told.to_fill_in
    found = {"transformer": tmp_path / "found.safetensors"}
    export(lora, "musubi-tuner", 8, folder, overwrite=True, bases=found)  # that of before is nowhere
    assert f"DIT = {str(found['transformer'])!r}" in script.read_text(encoding="utf-8")
    script.write_text("DIT = (", encoding="utf-8")
    export(lora, "musubi-tuner", 8, folder, overwrite=True)
    assert "DIT = 'path/to/" in script.read_text(encoding="utf-8")


def test_a_self_check_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("i2l_ext.converters.export._excess_error", lambda *_: 1.0)
    with pytest.raises(UserError, match="self-check failed"):
        export(style(MINI), "diffusers", 4, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "near"),
    [("musubi", "musubi-tuner"), ("aitoolkit", "ai-toolkit"), ("OneTrain", "onetrainer"), ("zzz", "")],
)
def test_a_wrong_name_is_told_the_nearest_right_one(capsys, word, near):
    with pytest.raises(SystemExit) as left:
        i2l("export", "x.safetensors", "--for", word)
    said = capsys.readouterr().err
    assert left.value.code == 2 and f"There is no trainer '{word}'." in said
    assert (f"Did you mean {near}?" in said) if near else "Did you mean" not in said
    assert "There are: musubi-tuner, ai-toolkit" in said and "invalid choice" not in said


def test_command(tmp_path, capsys):
    path = tmp_path / "my style.safetensors"
    style(MINI).save(path)
    assert i2l("export", path, "--for", "musubi-tuner", "--rank", "4", "-o", tmp_path / "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["trainer"], told["rank"], told["modules"]) == ("musubi-tuner", 4, 12)
    assert told["name"].startswith("my_style_i2l_r4_") and told["error"] < 1e-5
    assert i2l("export", path, "--for", "ai-toolkit") == 0
    assert (tmp_path / "my style_ai-toolkit" / "config.yaml").is_file()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_export_of_the_miniature_says_that_nothing_can_train_on_it(tmp_path, work, trainer, capsys):
    path = tmp_path / "style.safetensors"
    style(MINI).save(path)
    assert i2l("export", path, "--for", trainer, "-o", tmp_path / "a") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("Test LoRA: only `i2l draw` can use it.")
    assert "Test LoRA: only `i2l draw` can use it." in (tmp_path / "a" / "README.md").read_text()
    assert i2l("export", path, "--for", trainer, "-o", tmp_path / "b", "--json") == 0
    assert json.loads(capsys.readouterr().out)["caution"] == MINI.caution
    start = "\n".join(told).partition("To start")[2].partition("The LoRA in it")[0]
    assert "Nothing can be started" in start
    assert not re.search(r"python |download|Memory|Base model|starts the run", start)
    lay_out(tmp_path / "a" / "train.py", work)
    write_launcher(work, STUB)
    done = subprocess.run([sys.executable, tmp_path / "a/train.py"], cwd=work, capture_output=True, text=True)
    assert done.returncode == NOT_STARTED and not (work / "seen").exists()
    assert done.stderr.startswith("This LoRA is of mini, the test model: no trainer has it. The folder only shows")


def test_an_export_of_a_real_lora_has_no_caution(tmp_path):
    told = export(style(QWEN_IMAGE), "diffusers", 2, tmp_path / "out")
    assert told.caution == "" and "Test LoRA" not in (tmp_path / "out" / "README.md").read_text()


# names from outside in the texts


HOSTILE = (
    "x$(touch pwned)", "`touch pwned`", 'a"; touch pwned; "', "a'; touch pwned; '", "a # b: [c]", "$HOME",
    "ü 日本\u3000語 🦊", "-o", "{x}", "%s", "\\n", "coding: utf-7", "$INIT", "python", "%PATH%",
)  # fmt: skip
"""Names of files that mean something to a shell, to YAML, to Python or to what writes our scripts."""


def names_in(folder, told, work):
    """The path of the init file and the run's name (None where it has none), as what runs or reads the text gets
    them."""
    text = configuration(folder) or folder / ("start.py" if "start.py" in told.files else "train.py")
    if text.suffix == ".yaml" and "start.py" in told.files:
        assert yaml.safe_load(text.read_text(encoding="utf-8"))["output_dir"] == f"output/{told.name}"
        text = folder / "start.py"
    if text.name == "train.py":
        *_, args = parsed(text, work).values()
        if "network_weights" in args:
            return args.network_weights, args.output_name
        return args.lora_checkpoint, args.output_path.removeprefix("models/train/")
    if text.suffix == ".yaml":
        config = yaml.safe_load(text.read_text(encoding="utf-8"))["config"]
        return config["process"][0]["network"]["pretrained_lora_path"], config["name"]
    if text.suffix in (".json", ".toml"):
        config = read_config(text)
        name = (config.get("output_dir") or config["output_model_destination"]).removesuffix(".safetensors")
        init = config.get("init_lora") or config.get("lora_model_name")
        if init is None:
            init = f"{config['adapter']['init_from_existing']}/{Path(told.init).name}"
        return init, name.partition("/")[2]
    return next(
        ast.literal_eval(node.value)
        for node in ast.parse(text.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "INIT"
    ), None


@pytest.mark.skipif(os.name == "nt", reason="Windows forbids such names")
@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_names_are_text_and_nothing_more(tmp_path, work, trainer, hostile):
    """Of the file and of the folder: neither runs as a command, nor is it read as another text."""
    folder = tmp_path / hostile
    told = export(style(QWEN_IMAGE, paths=["transformer_blocks.0.attn.to_q"]), trainer, 2, folder, stem=hostile)
    path, name = names_in(folder, told, work)
    assert path == told.init == str(folder / f"{hostile}_init_r2.safetensors")
    assert name in (told.name, None) and re.fullmatch(r"[A-Za-z0-9._][A-Za-z0-9._-]*", told.name)
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.skipif(os.name == "nt", reason="Windows forbids such names")
@pytest.mark.parametrize("bad", ["a\ntouch pwned", "a\rb", "a\x1b[2J", "a\x85b", "a\u2028b", "a\udcffb", "a\uffffb"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_control_characters_in_names_are_refused(tmp_path, trainer, bad):
    lora = style(MINI, paths=["transformer_blocks.0.attn.to_q"])
    for folder, stem in ((tmp_path / "out", bad), (tmp_path / bad, "style")):
        with pytest.raises(UserError, match="control character in it"):
            export(lora, trainer, 2, folder, stem=stem)
    assert list(tmp_path.iterdir()) == []


def test_an_advised_command_survives_a_shell(tmp_path):
    for name in HOSTILE:
        words = shlex.split(ExportRequest(Path(name), "diffusers", output=Path("-out")).command_line())
        parsed = parser().parse_args(words[1:])
        assert (parsed.file.name, parsed.output) == (name, Path("./-out"))
