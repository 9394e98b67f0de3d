"""The hooks: networks that a trainer has built, set from a LoRA; musubi-tuner's by its documented contract, PEFT's
and diffusers' by their own code."""

import argparse
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import ai_toolkit_contract
import i2l_ext.hooks.ai_toolkit
import i2l_ext.hooks.peft
from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.architectures import MINI, QWEN_IMAGE
from i2l_ext.converters.fusing import fuse
from i2l_ext.converters.rank import resize
from i2l_ext.hooks import musubi
from i2l_ext.hooks.network import initialize_network, kohya_modules
from musubi_contract import Module, metadata_of_a_run, network_module
from test_converters_consumers import act, base
from test_converters_rank import gradients
from test_trainers import near, style


def small(cls="QwenImageTransformer2DModel", arch=MINI):
    """The modules of an architecture, in classes of the names that musubi looks for."""
    model = type(cls, (torch.nn.Module,), {})()
    blocks = {"double_blocks": "DoubleStreamBlock", "single_blocks": "SingleStreamBlock"}
    block_class = {"Q": "QwenImageTransformerBlock", "N": "JointTransformerBlock"}.get(cls[0], "ZImageTransformerBlock")
    for path, module in arch.modules.items():
        parent, parts = model, path.split(".")
        for depth, part in enumerate(parts[:-1]):
            if part not in parent._modules:
                is_block = module.stack is not None and depth == len(module.stack.split("."))
                kind = blocks.get(module.stack, block_class)
                made = type(kind, (torch.nn.Module,), {})() if is_block else torch.nn.Module()
                parent.add_module(part, made)
            parent = parent._modules[part]
        parent.add_module(parts[-1], torch.nn.Linear(module.kind.d_in, module.kind.d_out, bias=False))
    return model


@pytest.fixture(params=["musubi_tuner.networks", "networks"])
def trainer(request, monkeypatch):
    """musubi-tuner as installed, or with its folder on the path."""
    packages = request.param.split(".")
    for index in range(len(packages)):
        name = ".".join(packages[: index + 1])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for kind in ("lora_qwen_image", "lora_zimage", "lora_flux_2"):
        module = types.ModuleType(kind)
        module.create_arch_network = network_module(kind)
        module.create_arch_network_from_weights = lambda *args, **kwargs: (args, kwargs)
        monkeypatch.setitem(sys.modules, f"{request.param}.{kind}", module)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_style.safetensors"
    style(MINI).save(path)
    return path


def by_path(network):
    return {m.lora_name.removeprefix("lora_unet_"): m for m in network.unet_loras}


@pytest.mark.parametrize(("dim", "alpha"), [(6, 1.0), (2, 2.0), (3, None), (None, None), (4, 64.0)])
def test_musubi_starts_from_the_lora_whatever_alpha_says(trainer, file, capsys, dim, alpha):
    lora, unet = Lora.read(file), small()
    network = musubi.create_arch_network(1.0, dim, alpha, None, None, unet, init=str(file))
    network.apply_to(None, unet)
    rank = dim or 3
    told = capsys.readouterr().out.strip().splitlines()
    assert len(told) == 1 and told[0].startswith(f"i2l: {len(lora)} modules start from the LoRA")
    modules = by_path(network)
    assert len(modules) == 14 * MINI.stacks[0].depth
    for name, module in modules.items():
        path = next(path for path in MINI.modules if path.replace(".", "_") == name)
        assert module.lora_down.weight.shape[0] == rank
        assert module.scale == 1 and module.alpha == rank
        if path not in lora.specs:
            assert not module.lora_up.weight.any() and module.lora_down.weight.any()
        elif rank >= 3:
            assert near(act(module.lora_down.weight, module.lora_up.weight), act(*lora[path]))
        assert (
            all(gradients(module.lora_down.weight.detach(), module.lora_up.weight.detach())) or path not in lora.specs
        )


def test_what_musubi_saves_is_the_lora_again(trainer, file, tmp_path):
    """Its own alpha and dim, written as it writes them, read back by us: the same update."""
    import safetensors.torch

    unet = small()
    network = musubi.create_arch_network(1.0, 6, 1.0, None, None, unet, init=str(file))
    network.apply_to(None, unet)
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "saved")
    saved = Lora.read(tmp_path / "saved")
    for path, pair in ((path, Lora.read(file)[path]) for path in Lora.read(file)):
        assert near(act(*saved[path]), act(*pair))


def test_the_network_acts_as_the_lora(trainer, file):
    unet = small()
    x = torch.randn(2, MINI.modules["transformer_blocks.0.attn.to_q"].kind.d_in)
    layer = unet.get_submodule("transformer_blocks.0.attn.to_q")
    before = layer(x)
    musubi.create_arch_network(1.0, 8, 1.0, None, None, unet, init=str(file)).apply_to(None, unet)
    expected = before + x @ Lora.read(file).delta("transformer_blocks.0.attn.to_q").T
    assert torch.allclose(layer(x), expected, atol=1e-3)


def test_musubi_gets_its_own_arguments(trainer, file):
    args = {"exclude_patterns": r"['.*mlp\.net\.0.*']"}
    network = musubi.create_arch_network(1.0, 4, 1.0, None, None, small(), init=str(file), **args)
    assert len(network.unet_loras) == 12 * MINI.stacks[0].depth


def test_z_image_keeps_its_refiners(trainer, tmp_path, capsys):
    from i2l_ext.converters import architectures

    tiny = architectures.z_image("tiny", "tiny", depth=1, refiners=1, hidden=8, mlp=16, text=4)
    architectures.ARCHITECTURES["tiny"] = tiny
    try:
        lora = style(tiny)
        lora.save(tmp_path / "z")
        network = musubi.create_arch_network(
            1.0, 4, 1.0, None, None, small("ZImageTransformer2DModel", tiny), init=str(tmp_path / "z")
        )
        assert len(network.unet_loras) == 21
        assert "21 modules start from the LoRA" in capsys.readouterr().out
    finally:
        del architectures.ARCHITECTURES["tiny"]


@pytest.fixture
def klein(monkeypatch):
    """A LoRA of a tiny FLUX.2."""
    from i2l_ext.converters import architectures

    tiny = architectures.flux2("tiny-klein", "tiny klein", depth=2, singles=2, hidden=32, text=12)
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny-klein", tiny)
    return style(tiny)


@pytest.mark.parametrize("dim", [None, 12, 4])
def test_q_k_and_v_of_flux2_start_as_one_layer(trainer, klein, tmp_path, capsys, dim):
    """musubi's FLUX.2 has them so. Without a rank it is the sum of theirs, at which nothing is lost."""
    klein.save(tmp_path / "klein")
    unet = small("Flux2", klein.arch.fused)
    network = musubi.create_arch_network(1.0, dim, 1.0, None, None, unet, init=str(tmp_path / "klein"))
    assert "10 modules start from the LoRA" in capsys.readouterr().out
    modules, expected = by_path(network), resize(fuse(klein), dim or 9)
    assert len(modules) == 20 and len(expected) == 10
    for path in expected:
        module = modules[path.replace(".", "_")]
        assert module.lora_down.weight.shape[0] == (dim or 9)
        assert near(act(module.lora_down.weight, module.lora_up.weight), act(*expected[path]))
    if dim != 4:
        module = modules["double_blocks_0_img_attn_qkv"]
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            rows = module.lora_up.weight[32 * part : 32 * (part + 1)]
            assert near(act(module.lora_down.weight, rows), act(*klein[f"transformer_blocks.0.attn.{name}"]))


def test_a_network_without_fused_layers_of_a_model_that_has_them(klein):
    """What is one layer in both starts the same, whichever of the two the network was made of."""
    model = small("Flux2", klein.arch.fused)
    names = ["double_blocks.0.img_attn.proj", "single_blocks.0.linear1"]
    modules = [Module(f"lora_unet.{name}".replace(".", "_"), model.get_submodule(name), 4, 4, 1.0) for name in names]
    assert initialize_network(kohya_modules(modules), klein).from_lora == 2


def test_merging_stays_musubis(trainer):
    weights, unet = {}, small()
    args, _ = musubi.create_arch_network_from_weights(0.5, weights, None, unet, for_inference=True)
    assert args[0] == 0.5 and args[1] is weights and args[3] is unet and args[4] is True


def test_musubi_wrong_orders(trainer, file, tmp_path):
    make = musubi.create_arch_network
    with pytest.raises(SystemExit, match=r"^i2l: .*what to start from"):
        make(1.0, 4, 1.0, None, None, small())
    with pytest.raises(SystemExit, match=r"^i2l: .*what to start from"):
        make(1.0, 4, 1.0, None, None, small(), init=str(file), images="folder/")
    with pytest.raises(SystemExit, match=r"^i2l: .*no such file"):
        make(1.0, 4, 1.0, None, None, small(), init=str(tmp_path / "no"))
    with pytest.raises(SystemExit, match=r"^i2l: .*The model is a WanModel"):
        make(1.0, 4, 1.0, None, None, small("WanModel"), init=str(file))
    with pytest.raises(SystemExit, match=r"^i2l: .*none of the network's modules"):
        make(1.0, 4, 1.0, None, None, small("ZImageTransformer2DModel", _tiny_z()), init=str(file))


@pytest.mark.parametrize("seed", ["abc", "", "-1", "1.5", "²"])
def test_a_wrong_seed_is_told_before_anything_is_made(trainer, monkeypatch, seed):
    monkeypatch.setattr(musubi, "make_in_memory", lambda *args: pytest.fail("made"))
    with pytest.raises(SystemExit, match=r"^i2l: .*seed must be a whole number"):
        musubi.create_arch_network(1.0, 4, 1.0, None, None, small(), images="folder/", seed=seed)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_network_whose_scale_lets_nothing_through_is_refused(scale):
    unet, path = small(), next(iter(MINI.i2l_modules))
    module = Module(path, unet.get_submodule(path), 4, 4, 1.0)
    module.scale = scale
    with pytest.raises(UserError, match="would have no effect"):
        initialize_network(kohya_modules([module]), style(MINI))


def _in_fp16(lora):
    """What comes of starting a network in fp16 from ``lora``, whose module it is."""
    unet, path = small(), next(iter(MINI.i2l_modules))
    module = Module(path, unet.get_submodule(path).half(), 4, 4, 1.0).half()
    report = initialize_network(kohya_modules([module]), lora)
    return (
        report,
        act(module.lora_down.weight.detach().float(), module.lora_up.weight.detach().float()),
        act(*lora[path]),
    )


def test_what_a_network_in_fp16_loses_is_told_and_refused_above_a_bound():
    report, found, wanted = _in_fp16(style(MINI))
    assert float((found - wanted).norm() / wanted.norm()) < 0.01 and report.lost < 0.0025 and "fp16" not in str(report)
    report, _, _ = _in_fp16(style(MINI).scaled(5e-7))
    assert 0.0025 < report.lost < 0.01 and f"fp16 loses {report.lost:.1%} of the update" in str(report)
    with pytest.raises(UserError, match=r"fp16.*% of its update would be lost. Train the network in bf16 or fp32"):
        _in_fp16(style(MINI).scaled(1e-8))


def _tiny_z():
    from i2l_ext.converters.architectures import z_image

    return z_image("tiny", "tiny", depth=1, refiners=0, hidden=8, mlp=16, text=4)


def test_a_lora_of_another_width_is_refused(trainer, tmp_path):
    style(QWEN_IMAGE).save(tmp_path / "big")
    with pytest.raises(SystemExit, match=r"^i2l: .*maps (\d+) to \1, the LoRA 3072 to 3072"):
        musubi.create_arch_network(1.0, 4, 1.0, None, None, small(), init=str(tmp_path / "big"))


def test_without_musubi_it_says_so(file):
    with pytest.raises(SystemExit, match=r"^i2l: musubi-tuner was not found"):
        musubi.create_arch_network(1.0, 4, 1.0, None, None, small(), init=str(file))


@pytest.mark.parametrize("dim", [8, None])
def test_what_musubi_writes_into_its_files_is_true(trainer, file, dim):
    """Rank, alpha and network module of what is in the file, and no folder of this machine."""
    args = argparse.Namespace(
        network_dim=dim, network_alpha=1.0, network_module="i2l_ext.hooks.musubi",
        network_args=[f"init={file}", "seed=3", r"exclude_patterns=['.*mlp\.net\.0.*']"],
    )  # fmt: skip
    network, metadata = metadata_of_a_run(musubi, args, small())
    rank = dim or 3
    assert network.unet_loras[0].lora_down.weight.shape[0] == rank
    assert metadata["ss_network_dim"] == str(rank) and float(metadata["ss_network_alpha"]) == rank
    assert metadata["ss_network_module"] == "networks.lora_qwen_image"
    told = json.loads(metadata["ss_network_args"])
    assert told == {"init": "my_style.safetensors", "seed": "3", "exclude_patterns": r"['.*mlp\.net\.0.*']"}
    assert str(file.parent) not in str(metadata)


def test_the_hook_says_nothing_of_an_alpha_that_nobody_gave(trainer, file, capsys):
    musubi.create_arch_network(1.0, 8, 1.0, None, None, small(), init=str(file))
    assert "--network_alpha" not in (told := capsys.readouterr().out) and "alpha is the rank, 8" in told


SCRIPT = """import json, sys
sys.path.insert(0, %r)
print("THE MODEL IS LOADED", sys.argv)
from i2l_ext.hooks import musubi
print("KEPT" if musubi._kept else "NOT KEPT")
"""


def run_through(tmp_path, *arguments):
    (tmp_path / "train.py").write_text(SCRIPT % str(Path(i2l_ext.hooks.__file__).parents[2]))
    command = [sys.executable, "-m", "i2l_ext.hooks.musubi", tmp_path / "train.py", "--dit", "x", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["init=nowhere/style.safetensors"], "i2l: init=nowhere/style.safetensors: "),
        (["images=nowhere/pictures"], "i2l: images=nowhere/pictures: "),
        (["seed=abc", "init=x"], "i2l: seed must be a whole number of 0 or greater, not 'abc'."),
        ([], "i2l: Say what to start from"),
    ],
)
def test_a_slip_is_told_before_musubi_loads_the_model(tmp_path, given, told):
    done = run_through(tmp_path, "--network_args", *given, "--seed", "1")
    assert done.returncode == 1 and "THE MODEL" not in done.stdout
    assert done.stderr.startswith(told) and len(done.stderr.splitlines()) == 1


def test_musubis_script_runs_as_it_is_through_the_hook(tmp_path, file):
    done = run_through(tmp_path, "--network_args", f"init={file}", "seed=2", "--seed", "1")
    assert done.returncode == 0, done.stderr
    arguments = ["--dit", "x", "--network_args", f"init={file}", "seed=2", "--seed", "1"]
    assert done.stdout.splitlines() == [f"THE MODEL IS LOADED {[str(tmp_path / 'train.py'), *arguments]}", "KEPT"]


def test_musubi_starts_from_pictures(trainer, monkeypatch, tmp_path, capsys):
    asked = []

    def made(images, model):
        asked.append((str(images), model))
        return style(MINI)

    monkeypatch.setattr(musubi, "make_in_memory", made)
    musubi.create_arch_network(1.0, 4, 1.0, None, None, small(), images="folder/", model="mini")
    assert asked == [("folder", "mini")]
    assert "12 modules start from the LoRA" in capsys.readouterr().out


def test_pictures_are_made_into_a_lora_by_the_engine(tmp_path):
    from PIL import Image

    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "a.png")
    lora = musubi.make_in_memory(tmp_path, "mini")
    assert lora.arch is MINI and set(lora.specs) == set(MINI.i2l_modules)
    assert any(lora[path][1].any() for path in lora)  # in memory: its file is gone


def test_the_module_imports_by_its_path_and_is_light():
    code = "import sys; import i2l_ext.hooks.musubi; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# PEFT


def adapted(rank, alpha, targets, **options):
    from peft import LoraConfig

    model = base("qwen-image")
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **options))
    return model


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.mark.parametrize(
    ("rank", "alpha", "options"), [(5, 5, {}), (5, 40, {}), (2, 1, {}), (5, 5, {"use_rslora": True})]
)
def test_peft_starts_from_the_lora_at_its_own_rank_and_scale(tmp_path, rank, alpha, options):
    lora = style(QWEN_IMAGE)
    lora.save(tmp_path / "f")
    model = adapted(rank, alpha, [*ATTENTION, "img_mlp.net.0.proj"], **options)
    parameters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    report = i2l_ext.hooks.peft.initialize(model, tmp_path / "f")
    assert (report.from_lora, report.fresh, report.unused) == (4, 1, 8)
    assert str(report).startswith("i2l: 4 modules start from the LoRA")
    for name, parameter in model.named_parameters():
        assert "lora_" not in name or parameters[name] is parameter  # an optimiser may hold them already
    for name in ("to_q", "to_out.0"):
        layer = model.get_submodule(f"transformer_blocks.0.attn.{name}")
        found = layer.scaling["default"] * act(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        if rank >= 3:
            assert near(found, act(*lora[f"transformer_blocks.0.attn.{name}"]))


def test_a_peft_model_and_a_pipeline_have_other_names(tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = style(MINI)
    wrapped = get_peft_model(small(), LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"]))
    report = i2l_ext.hooks.peft.initialize(wrapped, lora)
    assert (report.from_lora, report.fresh) == (1, MINI.stacks[0].depth - 1)


def test_peft_wrong_orders():
    lora = style(QWEN_IMAGE)
    with pytest.raises(UserError, match="no LoRA adapter 'default'"):
        i2l_ext.hooks.peft.initialize(base("qwen-image"), lora)
    with pytest.raises(UserError, match="no LoRA adapter 'other'"):
        i2l_ext.hooks.peft.initialize(adapted(2, 2, ATTENTION), lora, "other")


def test_a_dora_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small(), LoraConfig(r=4, target_modules=["to_q"], use_dora=True))
    with pytest.raises(UserError, match="DoRA"):
        i2l_ext.hooks.peft.initialize(model, style(MINI))


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "lora_ga", "orthogonal", "mica", "of tomorrow"]
)
def test_an_init_that_may_change_the_base_model_is_refused(init):
    """By its name, whatever it has done: PiSSA and OLoRA take from the weights what the factors hold."""
    from peft import LoraConfig, get_peft_model

    changes = init in ("pissa", "olora")
    unet = small()
    weight = unet.get_submodule("transformer_blocks.0.attn.to_q").weight
    before = weight.detach().clone()
    model = get_peft_model(unet, LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=init if changes else True))
    assert torch.equal(weight, before) != changes
    model.peft_config["default"].init_lora_weights = init
    layer = model.get_submodule("base_model.model.transformer_blocks.0.attn.to_q")
    factors = [parameter.detach().clone() for parameter in layer.lora_A.parameters()]
    with pytest.raises(UserError, match=f"init_lora_weights='{init}'"):
        i2l_ext.hooks.peft.initialize(model, style(MINI))
    assert all(torch.equal(a, b) for a, b in zip(factors, layer.lora_A.parameters(), strict=True))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_a_plain_init_is_taken_and_its_fresh_rows_stay_as_long(init):
    """The others are as long as the columns of up, which bears high learning rates best (docs/claims.md)."""
    from peft import LoraConfig, get_peft_model

    lora = style(MINI)
    options = LoraConfig(r=8, lora_alpha=16, target_modules=["to_q"], init_lora_weights=init)
    model = get_peft_model(small(), options)
    layer = model.get_submodule("base_model.model.transformer_blocks.0.attn.to_q")
    norm = layer.lora_A["default"].weight.detach().square().sum(dim=1).mean().sqrt()
    i2l_ext.hooks.peft.initialize(model, lora)
    down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    scale = layer.scaling["default"]
    assert torch.allclose(down[:3].norm(dim=1), (scale * up[:, :3]).norm(dim=0).clamp(min=3**-0.5), rtol=1e-3)
    assert torch.allclose(down[3:].norm(dim=1), norm.expand(5), rtol=0.5)
    assert near(scale * act(down, up), act(*lora["transformer_blocks.0.attn.to_q"]))


def test_another_kind_of_adapter_is_refused():
    from peft import AdaLoraConfig, get_peft_model

    model = get_peft_model(small(), AdaLoraConfig(target_modules=["to_q"], total_step=10))
    with pytest.raises(UserError, match="is a ADALORA; only a plain LoRA"):
        i2l_ext.hooks.peft.initialize(model, style(MINI))


# ai-toolkit


def layers(unet, count=3):
    return {path: unet.get_submodule(path) for path in list(MINI.i2l_modules)[:count]}


class Trainer(ai_toolkit_contract.Process):
    """As docs/trainers.md says, or hooked in where an EMA is there already."""

    lora, late = None, False

    def hook_add_extra_train_params(self, params):
        if not self.late:
            i2l_ext.hooks.ai_toolkit.initialize(self, self.lora)
        return super().hook_add_extra_train_params(params)

    def hook_before_train_loop(self):
        super().hook_before_train_loop()
        if self.late:
            i2l_ext.hooks.ai_toolkit.initialize(self, self.lora)


@pytest.fixture(params=["early", "late"])
def process(request, tmp_path):
    """A function that makes a run in a folder, with its own small model; the same folder: the same run, resumed."""

    def make(**options):
        run = Trainer(tmp_path / "out", layers(small()), **options)
        run.lora, run.late = style(MINI), request.param == "late"
        return run

    return make


def strength(saved, lora, path="transformer_blocks.0.attn.to_q"):
    """How much of the LoRA's update is in a saved file."""
    down, up = (saved[f"transformer.{path}.lora_{side}.weight"] for side in "AB")
    expected = lora.delta(path)
    return float((up @ down * expected).sum() / expected.square().sum())


@pytest.mark.parametrize("ema", [None, 0.99])
@pytest.mark.parametrize("named_lora", [False, True])
def test_a_fresh_run_of_ai_toolkit_saves_the_lora_at_its_strength(process, ema, named_lora, capsys):
    run = process(ema=ema, named_lora=named_lora)
    saved = run.run(steps=3)
    assert strength(saved, run.lora) == pytest.approx(1, abs=0.02)
    assert "i2l: 3 modules start from the LoRA" in capsys.readouterr().out


@pytest.mark.parametrize("ema", [None, 0.99])
@pytest.mark.parametrize("named_lora", [False, True])
def test_a_resumed_run_of_ai_toolkit_keeps_its_training(process, ema, named_lora, capsys):
    saved = process(ema=ema, named_lora=named_lora, lr=0.05).run(steps=6)
    capsys.readouterr()
    resumed = process(ema=ema, named_lora=named_lora, lr=0.0)
    again = resumed.run(steps=8)
    assert resumed.step_num == 7
    for key, value in saved.items():
        assert torch.allclose(again[key], value, atol=1e-6), key
    assert "i2l: the run goes on from" in capsys.readouterr().out


def test_a_pretrained_lora_of_ai_toolkit_is_no_checkpoint(process, tmp_path):
    other = process(lr=0.0)
    other.save_root, other.lora = tmp_path / "other", style(MINI, rank=1)
    other.run(steps=1)
    run = process(pretrained=str(next((tmp_path / "other").iterdir())))
    assert strength(run.run(steps=2), run.lora) == pytest.approx(1, abs=0.02)


def test_ai_toolkits_network_alone_is_refused():
    with pytest.raises(UserError, match="Give the trainer"):
        i2l_ext.hooks.ai_toolkit.initialize(types.SimpleNamespace(unet_loras=[]), style(MINI))


def test_ai_toolkit_names(tmp_path):
    run = Trainer(tmp_path / "out", layers(small(), 5))
    run.lora = style(MINI)
    run.run(steps=0)
    for path, place in zip(MINI.i2l_modules, kohya_modules(run.network.unet_loras), strict=False):
        assert near(act(place.down, place.up), act(*run.lora[path]))
