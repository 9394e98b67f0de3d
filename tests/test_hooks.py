"""The hooks: networks that a trainer has built, set from a LoRA; musubi-tuner's by its documented contract, PEFT's
and diffusers' by their own code."""

import subprocess
import sys
import types

import pytest
import torch

import i2l_ext.hooks.ai_toolkit
import i2l_ext.hooks.peft
from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.architectures import MINI, QWEN_IMAGE
from i2l_ext.hooks import musubi
from i2l_ext.hooks.network import kohya_modules
from musubi_contract import Module, network_module
from test_converters_consumers import act, base
from test_converters_rank import gradients
from test_trainers import near, style


def small(cls="QwenImageTransformer2DModel", arch=MINI):
    """The modules of an architecture, in classes of the names that musubi looks for."""
    model = type(cls, (torch.nn.Module,), {})()
    block_class = "QwenImageTransformerBlock" if cls.startswith("Qwen") else "ZImageTransformerBlock"
    for path, module in arch.modules.items():
        parent, parts = model, path.split(".")
        for depth, part in enumerate(parts[:-1]):
            if part not in parent._modules:
                is_block = module.stack is not None and depth == len(module.stack.split("."))
                made = type(block_class, (torch.nn.Module,), {})() if is_block else torch.nn.Module()
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
    for kind in ("lora_qwen_image", "lora_zimage"):
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
    assert len(modules) == 14 * 3
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
    assert len(network.unet_loras) == 12 * 3


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


def test_merging_stays_musubis(trainer):
    weights, unet = {}, small()
    args, _ = musubi.create_arch_network_from_weights(0.5, weights, None, unet, for_inference=True)
    assert args[0] == 0.5 and args[1] is weights and args[3] is unet and args[4] is True


def test_musubi_wrong_orders(trainer, file, tmp_path):
    make = musubi.create_arch_network
    with pytest.raises(UserError, match="what to start from"):
        make(1.0, 4, 1.0, None, None, small())
    with pytest.raises(UserError, match="what to start from"):
        make(1.0, 4, 1.0, None, None, small(), init=str(file), images="folder/")
    with pytest.raises(UserError, match="no such file"):
        make(1.0, 4, 1.0, None, None, small(), init=str(tmp_path / "no"))
    with pytest.raises(UserError, match="The model is a WanModel"):
        make(1.0, 4, 1.0, None, None, small("WanModel"), init=str(file))
    with pytest.raises(UserError, match="none of the network's modules"):
        make(1.0, 4, 1.0, None, None, small("ZImageTransformer2DModel", _tiny_z()), init=str(file))


@pytest.mark.parametrize("seed", ["abc", "", "-1", "1.5", "²"])
def test_a_wrong_seed_is_told_before_anything_is_made(trainer, monkeypatch, seed):
    monkeypatch.setattr(musubi, "make_in_memory", lambda *args: pytest.fail("made"))
    with pytest.raises(UserError, match="seed must be a whole number"):
        musubi.create_arch_network(1.0, 4, 1.0, None, None, small(), images="folder/", seed=seed)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_network_whose_scale_lets_nothing_through_is_refused(scale):
    unet, path = small(), next(iter(MINI.i2l_modules))
    module = Module(path, unet.get_submodule(path), 4, 4, 1.0)
    module.scale = scale
    with pytest.raises(UserError, match="would have no effect"):
        i2l_ext.hooks.ai_toolkit.initialize(types.SimpleNamespace(unet_loras=[module]), style(MINI))


def _in_fp16(lora):
    """What comes of starting a network in fp16 from ``lora``, whose module it is."""
    unet, path = small(), next(iter(MINI.i2l_modules))
    module = Module(path, unet.get_submodule(path).half(), 4, 4, 1.0).half()
    report = i2l_ext.hooks.ai_toolkit.initialize(types.SimpleNamespace(unet_loras=[module]), lora)
    return (
        report,
        act(module.lora_down.weight.detach().float(), module.lora_up.weight.detach().float()),
        act(*lora[path]),
    )


def test_what_a_network_in_fp16_loses_is_told_and_refused_above_a_bound():
    report, found, wanted = _in_fp16(style(MINI))
    assert float((found - wanted).norm() / wanted.norm()) < 0.01 and report.lost < 0.0025 and "fp16" not in str(report)
    report, _, _ = _in_fp16(style(MINI).scaled(6e-7))
    assert 0.0025 < report.lost < 0.01 and f"fp16 loses {report.lost:.1%} of the update" in str(report)
    with pytest.raises(UserError, match=r"fp16.*% of its update would be lost. Train the network in bf16 or fp32"):
        _in_fp16(style(MINI).scaled(1e-8))


def _tiny_z():
    from i2l_ext.converters.architectures import z_image

    return z_image("tiny", "tiny", depth=1, refiners=0, hidden=8, mlp=16, text=4)


def test_a_lora_of_another_width_is_refused(trainer, tmp_path):
    style(QWEN_IMAGE).save(tmp_path / "big")
    with pytest.raises(UserError, match=r"maps (\d+) to \1, the LoRA 3072 to 3072"):
        musubi.create_arch_network(1.0, 4, 1.0, None, None, small(), init=str(tmp_path / "big"))


def test_without_musubi_it_says_so(file):
    with pytest.raises(UserError, match="musubi-tuner was not found"):
        musubi.create_arch_network(1.0, 4, 1.0, None, None, small(), init=str(file))


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
    assert (report.from_lora, report.fresh) == (1, 2)


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


def test_ai_toolkit_names(tmp_path):
    lora, unet = style(MINI), small()
    network = types.SimpleNamespace(unet_loras=[])
    for path in list(MINI.i2l_modules)[:5]:
        name = "transformer$$" + path.replace(".", "$$")
        network.unet_loras.append(Module(name, unet.get_submodule(path), 4, 4, 1.0))
    report = i2l_ext.hooks.ai_toolkit.initialize(network, lora)
    assert report.from_lora == 5
    for path, place in zip(MINI.i2l_modules, kohya_modules(network.unet_loras), strict=False):
        assert near(act(place.down, place.up), act(*lora[path]))
