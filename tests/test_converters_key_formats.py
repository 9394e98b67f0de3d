"""Every key format to every other, through every variant that is read; and what is refused by name."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i2l_ext.converters import files, key_formats
from i2l_ext.converters import keys as key_names
from i2l_ext.converters.architectures import ARCHITECTURES, MINI, QWEN_IMAGE, Z_IMAGE
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.key_formats import KEY_FORMATS, PREFIXES
from i2l_ext.converters.keys import parse_keys
from i2l_ext.converters.lora import Lora
from spellings import QWEN, Spelling, Z

PAIRS = [
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A", ".lora_B"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_down", ".lora_up"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A.default_0.weight", ".lora_B.default_0.weight"),
    (".lora_A.style.weight", ".lora_B.style.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    ("_lora.down", "_lora.up"),
]


def pair(arch, path, rank=2, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed + hash(path) % 1000)
    d_out, d_in = arch.modules[path].shape
    return (
        torch.randn(rank, d_in, generator=generator).to(dtype),
        torch.randn(d_out, rank, generator=generator).to(dtype),
    )


def keys(arch, paths, prefix, down, up, *, flat=False, alpha=False, rank=2):
    shapes = {}
    for path in paths:
        d_out, d_in = arch.modules[path].shape
        stem = prefix + (path.replace(".", "_") if flat else path)
        shapes |= {stem + down: (rank, d_in), stem + up: (d_out, rank)}
        if alpha:
            shapes[stem + ".alpha"] = ()
    return shapes


CHAINS = [
    "base_model.model.diffusion_model.",
    "base_model.model.transformer.",
    "transformer.base_model.model.",
    "model.diffusion_model.",
    "_orig_mod.",
    "transformer._orig_mod.",
    "base_model.model._orig_mod.",
    "lora_unet__orig_mod_",
]
"""Prefixes one after another, and what torch.compile puts between them."""


@pytest.mark.parametrize("prefix", [*PREFIXES, *CHAINS])
def test_every_variant_names_every_module(prefix):
    for suffixes, flat in itertools.product(PAIRS, (False, True)):
        reading = parse_keys(keys(MINI, MINI.modules, prefix, *suffixes, flat=flat, alpha=True), "f")
        assert reading.arch is MINI
        assert list(reading.slots) == list(MINI.modules)
        assert not reading.foreign and not reading.halves and not reading.text_encoder
        assert all(slot.alpha for slot in reading.slots.values())


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=lambda arch: arch.id)
@pytest.mark.parametrize(
    "key_format", [*KEY_FORMATS.values(), *key_formats.VARIANTS], ids=lambda key_format: key_format.name
)
def test_a_key_format_is_called_by_its_name(arch, key_format):
    if key_format.native:
        return  # its names are made when a file is written: test_fused below
    shapes = keys(arch, arch.modules, key_format.prefix, key_format.down, key_format.up, flat=not key_format.dotted)
    assert parse_keys(shapes, "f").key_format == key_format.name


@settings(deadline=None)
@given(st.sets(st.sampled_from(sorted(MINI.modules)), min_size=1), st.sampled_from(sorted(KEY_FORMATS)))
def test_any_subset_is_recognised(paths, name):
    key_format = KEY_FORMATS[name]
    shapes = keys(MINI, paths, key_format.prefix, key_format.down, key_format.up, flat=not key_format.dotted)
    reading = parse_keys(shapes, "f")
    assert reading.arch is MINI
    assert set(reading.slots) == paths
    assert reading.key_format in {name, name.removesuffix("-fused")}


def save(path, tensors):
    safetensors.torch.save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
    return path


def write(arch, modules, path, prefix, down, up, *, flat=False, alphas=None):
    tensors = {}
    for module, (a, b) in modules.items():
        stem = prefix + (module.replace(".", "_") if flat else module)
        tensors |= {stem + down: a, stem + up: b}
        if alphas and module in alphas:
            tensors[stem + ".alpha"] = torch.tensor(alphas[module])
    return save(path, tensors)


@settings(max_examples=60, deadline=None)
@given(
    paths=st.sets(st.sampled_from(sorted(MINI.modules)), min_size=1, max_size=5),
    prefix=st.sampled_from([*PREFIXES, *CHAINS]),
    suffixes=st.sampled_from(PAIRS),
    flat=st.booleans(),
    rank=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    alpha=st.sampled_from([None, 0.5, 1.0, 3.0, -1.0, "rank", "half"]),
    to=st.lists(st.sampled_from(sorted(KEY_FORMATS)), min_size=1, max_size=3),
)
def test_delta_is_the_same_after_any_chain(tmp_path_factory, paths, prefix, suffixes, flat, rank, dtype, alpha, to):
    folder = tmp_path_factory.mktemp("chain")
    alpha = {"rank": float(rank), "half": rank / 2}.get(alpha, alpha)
    modules = {path: pair(MINI, path, rank, dtype) for path in paths}
    scale = 1.0 if alpha is None else alpha / rank
    path = write(
        MINI, modules, folder / "0", prefix, *suffixes, flat=flat, alphas=alpha and dict.fromkeys(paths, alpha)
    )
    for step, key_format in enumerate(to):
        Lora.read(path).save(folder / f"{step + 1}", key_format)
        path = folder / f"{step + 1}"
    lora = Lora.read(path)
    assert set(lora.specs) == paths
    for module, (down, up) in modules.items():
        exact = scale * (up.double() @ down.double())
        a, b = lora[module]
        after = b.double() @ a.double()
        if scale in (0.25, 0.5, 1, 2):
            assert torch.equal(after, exact)
        else:
            assert (after - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", [4.0, 8.0, 2.0, 0.125])
def test_the_end_of_float16_loses_nothing(tmp_path, dtype, alpha):
    down, up = pair(MINI, "proj_out", 4, dtype)
    up = (up.double() * 6e-8).to(dtype)  # float16: among its last subnormal numbers
    path = write(MINI, {"proj_out": (down, up)}, tmp_path / "f", "", *PAIRS[0], alphas={"proj_out": alpha})
    a, b = Lora.read(path)["proj_out"]
    assert torch.equal(b.double() @ a.double(), alpha / 4 * up.double() @ down.double())


def test_alpha_is_a_scalar_in_float32_and_equals_the_rank(tmp_path):
    lora = Lora.of(MINI, {path: pair(MINI, path, 3) for path in MINI.i2l_modules})
    lora.save(tmp_path / "k", "kohya")
    tensors = safetensors.torch.load_file(tmp_path / "k")
    alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
    assert len(alphas) == len(MINI.i2l_modules)
    assert all(alpha.shape == () and alpha.dtype == torch.float32 and alpha == 3 for alpha in alphas)


@pytest.mark.parametrize("name", [name for name in KEY_FORMATS if not name.startswith("kohya")])
def test_no_alpha_where_a_reader_would_misread_it(tmp_path, name):
    lora = Lora.of(MINI, {path: pair(MINI, path) for path in MINI.i2l_modules})
    lora.save(tmp_path / "f", name)
    assert not any("alpha" in key for key in safetensors.torch.load_file(tmp_path / "f"))


QKV = [f"layers.0.attention.to_{x}" for x in "qkv"]


def z_factors(shared, paths=QKV, rank=2):
    made = {path: pair(Z_IMAGE, path, rank, seed=i) for i, path in enumerate(paths)}
    if shared:
        made = {path: (made[paths[0]][0], up) for path, (_, up) in made.items()}
    return made


def act(down, up):
    """What the update does to three inputs, in float64: tells two updates apart without forming them."""
    probe = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return up.double() @ (down.double() @ probe)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("missing", [None, *QKV])
def test_fused_qkv_both_ways(tmp_path, shared, missing):
    modules = z_factors(shared, [path for path in QKV if path != missing])
    modules["layers.0.attention.to_out.0"] = pair(Z_IMAGE, "layers.0.attention.to_out.0")
    modules["layers.0.feed_forward.w1"] = pair(Z_IMAGE, "layers.0.feed_forward.w1")
    Lora.of(Z_IMAGE, modules).save(tmp_path / "fused", "kohya-fused")
    tensors = safetensors.torch.load_file(tmp_path / "fused")
    assert {key.split(".")[0] for key in tensors} == {
        "lora_unet_layers_0_attention_qkv",
        "lora_unet_layers_0_attention_out",
        "lora_unet_layers_0_feed_forward_w1",
    }
    down, up, alpha = (
        tensors[f"lora_unet_layers_0_attention_qkv.{x}"] for x in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    rank = 2 if shared else 2 * len([path for path in QKV if path in modules])
    assert (down.shape, up.shape, alpha) == ((rank, 3840), (3 * 3840, rank), rank)
    whole = act(down, up)
    for index, path in enumerate(QKV):
        expected = act(*modules[path]) if path in modules else torch.zeros(3840, 3, dtype=torch.float64)
        assert torch.allclose(whole[3840 * index : 3840 * (index + 1)], expected, rtol=1e-12, atol=1e-12)
    back = Lora.read(tmp_path / "fused")
    assert parse_keys(files.TensorFile(tmp_path / "fused").header.shapes, "f").key_format == "kohya-fused"
    back.save(tmp_path / "split", "kohya")
    split = Lora.read(tmp_path / "split")
    for path, (a, b) in modules.items():
        down, up = split[path]
        assert torch.allclose(act(down, up), act(a, b), rtol=1e-12, atol=1e-12)
        if shared:
            assert torch.equal(down, a) and torch.equal(up, b)


def test_native_dotted_names_are_read(tmp_path):
    """ComfyUI's own names of Z-Image, under any prefix."""
    modules = z_factors(True)
    down = modules[QKV[0]][0]
    up = torch.cat([modules[path][1] for path in QKV])
    stem = "diffusion_model.layers.0.attention.qkv"
    save(tmp_path / "f", {stem + ".lora_A.weight": down, stem + ".lora_B.weight": up})
    lora = Lora.read(tmp_path / "f")
    assert list(lora.specs) == QKV
    for path in QKV:
        assert torch.equal(lora[path][0], down) and torch.equal(lora[path][1], modules[path][1])


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("fused_first", [True, False])
def test_of_a_layer_that_stands_fused_and_split_the_split_one_is_taken(tmp_path, fused_first, equal):
    modules = z_factors(True)
    down = modules[QKV[0]][0]
    up = torch.cat([modules[path][1] for path in QKV]) * (1 if equal else 2)
    stem = "lora_unet_layers_0_attention_"
    fused = {"qkv.lora_down.weight": down, "qkv.lora_up.weight": up, "qkv.alpha": torch.tensor(2.0)}
    split = {
        f"{path[-4:]}.lora_{side}.weight": factor
        for path in QKV
        for side, factor in zip(("down", "up"), modules[path], strict=True)
    }
    tensors = {stem + key: tensor for key, tensor in (fused | split if fused_first else split | fused).items()}
    save(tmp_path / "f", tensors)
    lora = Lora.read(tmp_path / "f")
    reading = lora.read_from.reading
    assert sorted(reading.doubled) == sorted(stem + key for key in fused)
    assert reading.key_format == "kohya" and not reading.collisions and not reading.foreign
    for path in QKV:
        assert torch.equal(lora.delta(path), modules[path][1].float() @ modules[path][0].float())


def test_what_is_only_in_the_fused_layer_is_taken_from_there():
    fused = {"layers.0.attention.qkv.lora_A.weight": (2, 3840), "layers.0.attention.qkv.lora_B.weight": (11520, 2)}
    reading = parse_keys(fused | keys(Z_IMAGE, QKV[:1], "", *PAIRS[0]), "f")
    assert [bool(reading.slots[path].rows) for path in QKV] == [False, True, True]
    assert not reading.doubled and not reading.halves


def test_mixed_key_formats_are_read_where_no_module_is_twice(tmp_path):
    first, second, *_ = MINI.i2l_modules
    shapes = keys(MINI, [first], "diffusion_model.", *PAIRS[0]) | keys(
        MINI, [second], "lora_unet_", *PAIRS[3], flat=True
    )
    reading = parse_keys(shapes, "f")
    assert reading.key_format == "mixed"
    assert reading.key_formats == {"webui": 2, "kohya": 2}
    assert {slot.key_format for slot in reading.slots.values()} == {"webui", "kohya"}
    collision = shapes | keys(MINI, [first], "transformer.", *PAIRS[0])
    assert [path for path, *_ in parse_keys(collision, "f").collisions] == [first]
    save(tmp_path / "f", {key: torch.ones(shape) for key, shape in collision.items()})
    with pytest.raises(UserError, match="two keys name the module " + re.escape(first)):
        Lora.read(tmp_path / "f")


@pytest.mark.parametrize(
    ("spelled", "path"),
    [
        ("context.refiner.1.attention.to_q", "context_refiner.1.attention.to_q"),
        ("noise.refiner.0.attention.to.out.0", "noise_refiner.0.attention.to_out.0"),
        ("layers.3.feed.forward.w1", "layers.3.feed_forward.w1"),
        ("layers.3._orig_mod.feed_forward.w1", "layers.3.feed_forward.w1"),
    ],
)
def test_names_that_a_converter_or_compiler_left_are_read(spelled, path):
    d_out, d_in = Z_IMAGE.modules[path].shape
    stem = f"diffusion_model.{spelled}.lora_"
    reading = parse_keys({stem + "A.weight": (2, d_in), stem + "B.weight": (d_out, 2)}, "f")
    assert list(reading.slots) == [path]
    assert reading.key_format == "other"  # no program that reads webui knows the name


def test_two_adapters_in_one_file_are_told_and_not_mixed(tmp_path):
    path = next(iter(MINI.i2l_modules))
    shapes = keys(MINI, [path], "", ".lora_A.a.weight", ".lora_B.a.weight") | keys(
        MINI, [path], "", ".lora_A.b.weight", ".lora_B.b.weight", rank=3
    )
    reading = parse_keys(shapes, "f")
    assert reading.collisions == ((path, f"{path}.lora_A.a.weight", f"{path}.lora_A.b.weight"),)
    assert reading.slots[path].down == f"{path}.lora_A.a.weight" and reading.slots[path].up.endswith(".a.weight")
    save(tmp_path / "f", {key: torch.ones(shape) for key, shape in shapes.items()})
    with pytest.raises(UserError, match="two keys name the module"):
        Lora.read(tmp_path / "f")


def test_an_alpha_without_factors_does_no_harm(tmp_path):
    first, second, *_ = MINI.i2l_modules
    tensors = {key: torch.ones(shape) for key, shape in keys(MINI, [first], "", *PAIRS[0]).items()}
    save(tmp_path / "f", tensors | {second + ".alpha": torch.tensor(1.0)})
    reading = Lora.read(tmp_path / "f").read_from.reading
    assert (reading.stray_alphas, reading.halves, list(reading.slots)) == ((second + ".alpha",), (), [first])


def test_text_encoder_foreign_and_half_modules_are_told_apart():
    path = next(iter(MINI.i2l_modules))
    shapes = keys(MINI, [path], "transformer.", *PAIRS[0]) | {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 8),
        "transformer.something_else.lora_A.weight": (2, 8),
        "transformer.proj_out.lora_A.weight": (2, MINI.modules["proj_out"].kind.d_in),
    }
    reading = parse_keys(shapes, "f")
    assert [len(reading.text_encoder), len(reading.foreign), list(reading.halves)] == [1, 1, ["proj_out"]]


REFUSED = {
    "OFT": "transformer_blocks.0.attn.to_q.oft_blocks",
    "GLoRA": "transformer_blocks.0.attn.to_q.a1.weight",
    "IA3": "lycoris_transformer_blocks_0_attn_to_q.ia3_w",
    "LoRA biases": "transformer.transformer_blocks.0.attn.to_q.lora_B.bias",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_networks_are_named_and_refused(kind):
    path = next(iter(QWEN_IMAGE.i2l_modules))
    shapes = keys(QWEN_IMAGE, [path], "", *PAIRS[0]) | {REFUSED[kind]: (3,)}
    with pytest.raises(UserError, match=f"{kind}.*not supported.*{re.escape(REFUSED[kind])}"):
        parse_keys(shapes, "f")


def test_the_prefix_model_diffusion_model_is_no_difference():
    path = next(iter(QWEN_IMAGE.i2l_modules))
    assert len(parse_keys(keys(QWEN_IMAGE, [path], "model.diffusion_model.", *PAIRS[0]), "f").slots) == 1


FLUX = {
    f"transformer.{block}.attn.to_{x}.lora_{side}.weight": shape
    for block, x in itertools.product(["transformer_blocks.0", "single_transformer_blocks.0"], "qkv")
    for side, shape in (("A", (4, 3072)), ("B", (3072, 4)))
}
OTHERS = {
    "HunyuanVideo shares names and shapes with FLUX.1": (
        FLUX | {f"double_blocks.0.img_mlp.fc1.lora_{x}.weight": s for x, s in (("A", (4, 3072)), ("B", (12288, 4)))},
        "another model.*HunyuanVideo",
    ),
    "Qwen-Image 2.x shares names and shapes with FLUX.2 klein 9B": (
        {
            f"transformer_blocks.0.{layer}.lora_{x}.weight": s
            for layer, width in (("attn.to_q", 4096), ("img_mlp.proj", 12288))
            for x, s in (("A", (4, 4096)), ("B", (width, 4)))
        },
        "another model.*Qwen-Image 2",
    ),
    "other shapes": (
        {f"transformer_blocks.0.attn.to_q.lora_{x}.weight": s for x, s in (("A", (4, 5120)), ("B", (5120, 4)))},
        "names of Qwen-Image but not its shapes.*5120 to 5120, not 3072 to 3072",
    ),
    "more blocks": (
        {
            f"transformer_blocks.{n}.attn.to_q.lora_{x}.weight": s
            for n in (0, 60)
            for x, s in (("A", (4, 3072)), ("B", (3072, 4)))
        },
        "beyond the 60 blocks",
    ),
    "unknown": (
        {"blocks.0.wq.lora_down.weight": (4, 10), "blocks.0.wq.lora_up.weight": (10, 4)},
        r"another model.*blocks\.0\.wq.*\[4, 10\].*Known: Qwen-Image, Z-Image",
    ),
    "a checkpoint": ({"transformer_blocks.0.attn.to_q.weight": (3072, 3072)}, "not a LoRA"),
    "nothing": ({}, "it is empty"),
    "one odd module of many": (
        {
            f"transformer_blocks.{n}.attn.to_q.lora_{x}.weight": (s if n != 5 else s[::-1])
            for n in range(20)
            for x, s in (("A", (4, 3072)), ("B", (3072, 4)))
        },
        r"names of Qwen-Image but not its shapes: transformer_blocks\.5\.attn\.to_q",
    ),
    "another width, beyond the miniature's depth": (
        {
            f"transformer_blocks.{n}.attn.to_q.lora_{x}.weight": s
            for n in range(38)
            for x, s in (("A", (4, 2432)), ("B", (2432, 4)))
        },
        "names of Qwen-Image but not its shapes.*maps 2432 to 2432, not 3072",
    ),
    "a text encoder's alone": (
        {f"lora_te_layers_0_q_proj.lora_{x}.weight": s for x, s in (("down", (4, 8)), ("up", (8, 4)))},
        "LoRA of a text encoder only",
    ),
    "ranks that differ": (
        {f"transformer_blocks.0.attn.to_q.lora_{x}.weight": s for x, s in (("A", (4, 3072)), ("B", (3072, 8)))},
        "ranks 4 and 8",
    ),
    "a convolution": (
        {
            f"transformer_blocks.0.attn.to_q.lora_{x}.weight": s
            for x, s in (("A", (4, 3072, 1, 1)), ("B", (3072, 4, 1, 1)))
        },
        "not matrices",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_are_refused_with_what_was_seen(case):
    shapes, reason = OTHERS[case]
    with pytest.raises(UserError, match=reason):
        parse_keys(shapes, "f")


def test_a_file_that_one_architecture_explains_is_not_held_against_the_others(monkeypatch):
    """Reading a full file once for each of eight architectures took longer than the file itself."""
    tried = []
    parse = key_names._parse_as
    monkeypatch.setattr(key_names, "_parse_as", lambda arch, split: tried.append(arch.id) or parse(arch, split))
    shapes = {}
    for path, module in QWEN_IMAGE.i2l_modules.items():
        d_out, d_in = module.shape
        shapes |= {f"diffusion_model.{path}.lora_A.weight": (4, d_in)}
        shapes |= {f"diffusion_model.{path}.lora_B.weight": (d_out, 4)}
    assert parse_keys(shapes, "f").arch is QWEN_IMAGE
    assert tried == ["qwen-image"]


@pytest.mark.parametrize("alpha", ["none", "half"])
@pytest.mark.parametrize("family", [QWEN, Z])
def test_a_fused_layer_beside_its_parts_is_taken_once(tmp_path, family, alpha):
    """Qwen-Image's fused names are aliases, Z-Image's those of its first implementation."""
    spelling = Spelling(family, "diffusion_model.", "A/B", "both", alpha)
    lora, scales = Lora.read(spelling.save(tmp_path / "f", full=True)), spelling.scales()
    parts = [layer for layer in spelling.layers(full=True) if len(layer.paths) == 1]
    assert {*lora} == {layer.paths[0] for layer in parts} and lora.read_from.reading.doubled
    for layer in parts:
        down, up = lora[layer.paths[0]]
        assert torch.equal(down, layer.down) and torch.equal(up, scales[layer.paths[0]] * layer.up)


@pytest.mark.parametrize(("down", "up"), PAIRS)
def test_both_factors_are_one_layer_whatever_their_suffixes(down, up):
    shapes = keys(QWEN_IMAGE, ["proj_out"], "diffusion_model.", down, up, alpha=True)
    [layer] = key_names.layers_of(QWEN_IMAGE, shapes)
    assert layer.suffix == down and set(layer.keys) == {"down", "up", "alpha"}


def test_a_pair_of_suffixes_is_read_by_its_entry_alone():
    """Whatever it is called; in a process of its own, as the tables are read once."""
    code = """
from i2l_ext.converters import key_formats
key_formats.FACTOR_PAIRS[".unheard_in"] = ".unheard_out"
key_formats.SUFFIXES |= {".unheard_in": "down", ".unheard_out": "up"}
from i2l_ext.converters import keys
from i2l_ext.converters.architectures import MINI
shapes = {"proj_out.unheard_in.weight": (1, 96), "proj_out.unheard_out.weight": (48, 1), "proj_out.alpha": ()}
assert len(keys.layers_of(MINI, shapes)) == 1
"""
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(root)})
