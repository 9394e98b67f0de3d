"""The architectures, held against the classes of diffusers and DiffSynth-Studio on the meta device."""

import hashlib
import sys
from types import ModuleType

import pytest
import torch

from i2l_ext.converters import UserError
from i2l_ext.converters.architectures import (
    ARCHITECTURES,
    FLUX,
    FLUX2_DEV,
    HIDREAM_O1,
    KLEIN_4B,
    KLEIN_9B,
    MINI,
    QWEN_IMAGE,
    Z_IMAGE,
    qwen_image,
)
from i2l_ext.converters.key_formats import KEY_FORMATS
from i2l_ext.converters.keys import parse_keys
from i2l_ext.converters.spellings import native_layers
from peers import diffsynth

FLUX_LIKE = [FLUX, KLEIN_4B, KLEIN_9B, FLUX2_DEV]
HASHES = {
    KLEIN_4B.id: "3bde7b817fec8143028b6825a63180df",
    KLEIN_9B.id: "39c6fc48f07bebecedbbaa971ff466c8",
    FLUX2_DEV.id: "d38e1d5c5aec3b0a11e79327ac6e3b0f",
    HIDREAM_O1.id: "58a7c1073d79556bfc61e05e6061b771",
}
"""Of the published checkpoints: the md5 of all names and shapes, from DiffSynth-Studio's configs/model_configs.py."""


def hidream():
    """The class of diffsynth, which does not need its attention to be built."""
    for name in ("core", "core.attention", "core.attention.attention"):
        module = sys.modules.setdefault(f"peer_diffsynth.{name}", ModuleType(name))
        module.attention_forward = module.gradient_checkpoint_forward = None
    return diffsynth("models.hidream_o1_image_dit").HiDreamO1ImageModel()


def model(arch):
    """The whole class, as it is published."""
    import diffusers

    klein = {"guidance_embeds": False}
    made = {
        QWEN_IMAGE.id: diffusers.QwenImageTransformer2DModel,
        Z_IMAGE.id: diffusers.ZImageTransformer2DModel,
        FLUX.id: lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
        KLEIN_4B.id: lambda: diffusers.Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, **klein
        ),
        KLEIN_9B.id: lambda: diffusers.Flux2Transformer2DModel(
            num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, **klein
        ),
        FLUX2_DEV.id: diffusers.Flux2Transformer2DModel,
        HIDREAM_O1.id: hidream,
    }
    with torch.device("meta"):
        return made[arch.id]()


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES.values() if a is not MINI], ids=lambda arch: arch.id)
def test_every_linear_layer_by_name_and_shape(arch):
    whole = model(arch)
    layers = {name: layer for name, layer in whole.named_modules() if isinstance(layer, torch.nn.Linear)}
    found = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    assert {path: module.shape for path, module in arch.modules.items()} == found
    if arch.id in HASHES:
        shapes = {name: "_".join(map(str, value.shape)) for name, value in whole.state_dict().items()}
        told = sorted([*shapes, *(f"{name}:{shape}" for name, shape in shapes.items())])
        assert hashlib.md5(",".join(told).encode(), usedforsecurity=False).hexdigest() == HASHES[arch.id]


@pytest.mark.parametrize("arch", FLUX_LIKE, ids=lambda arch: arch.id)
def test_native_names_are_those_that_diffusers_converts(arch):
    """Each native layer holds its number in every row: the converter puts each row where our table says."""
    from diffusers.loaders import single_file_utils

    convert = (
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
        if arch is FLUX
        else single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers
    )
    native = {layer.name: layer.paths for layer in native_layers(arch.id).values()}
    checkpoint, expected = {}, {}
    for number, (name, paths) in enumerate(native.items()):
        rows = sum(arch.modules[path].shape[0] for path in paths)
        checkpoint[name + ".weight"] = (number * 1e6 + torch.arange(rows, dtype=torch.float64))[:, None]
        start = 0
        for path in paths:
            end = start + arch.modules[path].shape[0]
            expected[path + ".weight"] = checkpoint[name + ".weight"][start:end]
            start = end
    assert {*expected} == {path + ".weight" for path in arch.modules} - {"norm_out.linear.weight"}
    # what is no linear layer's weight of ours, but the converter asks for it
    for name in [*checkpoint] if arch is FLUX else []:
        checkpoint[name.replace(".weight", ".bias")] = torch.zeros(len(checkpoint[name]))
    for block in range(arch.stacks[0].depth if arch is FLUX else 0):
        for side in ("img", "txt"):
            for norm in ("query_norm", "key_norm"):
                checkpoint[f"double_blocks.{block}.{side}_attn.norm.{norm}.scale"] = torch.zeros(1)
    for block in range(arch.stacks[1].depth if arch is FLUX else 0):
        for norm in ("query_norm", "key_norm"):
            checkpoint[f"single_blocks.{block}.norm.{norm}.scale"] = torch.zeros(1)
    for part in ("weight", "bias"):
        checkpoint[f"final_layer.adaLN_modulation.1.{part}"] = torch.zeros(2, 1)
    converted = convert(checkpoint)
    assert all(torch.equal(converted[name], rows) for name, rows in expected.items())


def lora_keys(arch, paths, prefix, down, up, *, flat=False, native=False):
    layers = native_layers(arch.id) if native else {}
    shapes = {}
    for path in paths:
        layer = layers.get(path)
        parts = layer.paths if layer else (path,)
        stem = layer.name if layer else path
        stem = prefix + (stem.replace(".", "_") if flat else stem)
        shapes[stem + down] = (4, arch.modules[path].shape[1])
        shapes[stem + up] = (sum(arch.modules[part].shape[0] for part in parts), 4)
    return shapes


SPELLINGS = {
    "webui": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight", False),
    "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight", True),
    "diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight", False),
    "bare": ("", ".lora_A.weight", ".lora_B.weight", False),
}


@pytest.mark.parametrize("native", [False, True], ids=["ours", "native"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("arch", [*FLUX_LIKE, HIDREAM_O1], ids=lambda arch: arch.id)
def test_a_lora_is_taken_for_what_it_is(arch, spelling, native):
    prefix, down, up, flat = SPELLINGS[spelling]
    reading = parse_keys(lora_keys(arch, arch.modules, prefix, down, up, flat=flat, native=native), "f")
    assert reading.arch is arch
    assert list(reading.slots) == list(arch.modules)
    assert not reading.foreign and not reading.halves


@pytest.mark.parametrize("arch", FLUX_LIKE, ids=lambda arch: arch.id)
def test_rows_of_a_fused_layer(arch):
    prefix, down, up, flat = SPELLINGS["kohya"]
    slots = parse_keys(lora_keys(arch, arch.modules, prefix, down, up, flat=flat, native=True), "f").slots
    width = arch.modules["transformer_blocks.0.attn.to_q"].shape[0]
    assert slots["transformer_blocks.0.attn.to_v"].rows == (2 * width, 3 * width)
    assert slots["transformer_blocks.0.attn.to_v"].up == "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"
    if arch is FLUX:
        assert slots["single_transformer_blocks.37.proj_mlp"].rows == (3 * width, 7 * width)


def test_qwen_images_fused_projections():
    attn = "transformer_blocks.3.attn"
    parts = {"to_qkv": ("to_q", "to_k", "to_v"), "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj")}
    for fused, kinds in parts.items():
        shapes = {
            f"transformer.{attn}.{fused}.lora_A.weight": (4, 3072),
            f"transformer.{attn}.{fused}.lora_B.weight": (9216, 4),
        }
        reading = parse_keys(shapes, "f")
        assert reading.arch is QWEN_IMAGE and reading.key_format == "other"
        assert [slot.rows for slot in reading.slots.values()] == [(0, 3072), (3072, 6144), (6144, 9216)]
        assert list(reading.slots) == [f"{attn}.{kind}" for kind in kinds]
    assert not native_layers(QWEN_IMAGE.id)  # they are read, never written


@pytest.mark.parametrize("arch", FLUX_LIKE, ids=lambda arch: arch.id)
@pytest.mark.parametrize("key_format", ["kohya-fused", "webui-fused"])
def test_convert_flux(tmp_path, arch, key_format):
    """From the first implementation's names to ours and back: the same update."""
    from i2l_ext.converters import Lora

    paths = [path for path, module in arch.modules.items() if module.block == 1]
    made = torch.Generator().manual_seed(0)
    pairs = {}
    for path in paths:
        d_out, d_in = arch.modules[path].shape
        pairs[path] = (torch.randn(2, d_in, generator=made), torch.randn(d_out, 2, generator=made))
    first = Lora.of(arch, pairs)
    first.save(tmp_path / "webui", "webui")
    Lora.read(tmp_path / "webui").save(tmp_path / "native", key_format)
    again = Lora.read(tmp_path / "native")
    assert again.arch is arch and list(again) == list(first)
    assert again.read_from.reading.key_format == key_format
    probe = {path: torch.randn(arch.modules[path].shape[1], generator=made) for path in paths}
    for path in paths:
        down, up = first[path]
        down_again, up_again = again[path]
        assert torch.allclose(up_again @ (down_again @ probe[path]), up @ (down @ probe[path]), rtol=1e-4, atol=1e-3)


def test_hunyuan_video_is_not_flux():
    """It has names and shapes of FLUX.1, and one more double block and two more single ones."""
    prefix, down, up, flat = SPELLINGS["kohya"]
    shapes = lora_keys(FLUX, ["transformer_blocks.0.attn.to_q"], prefix, down, up, flat=flat, native=True)
    one = {key.replace("img_attn_qkv", "img_mlp_fc1"): shape for key, shape in shapes.items()}
    beyond = {key.replace("blocks_0_", "blocks_19_"): shape for key, shape in shapes.items()}
    for other, told in ((one, "HunyuanVideo"), (beyond, "beyond the 19 blocks of FLUX.1")):
        with pytest.raises(UserError, match=told):
            parse_keys(shapes | other, "f")


def test_a_foreign_key_in_a_single_block_is_foreign_and_no_more():
    prefix, down, up, flat = SPELLINGS["webui"]
    shapes = lora_keys(FLUX, FLUX.modules, prefix, down, up, flat=flat)
    extra = "diffusion_model.single_transformer_blocks.30.extra.lora_A.weight"
    reading = parse_keys(shapes | {extra: (4, 8)}, "f")
    assert reading.arch is FLUX and reading.foreign == (extra,)


def test_the_miniature_answers_for_its_own_sizes_alone():
    for key_format in KEY_FORMATS.values():
        path = "transformer_blocks.0.attn.to_q"
        down, up, _ = key_format.keys(path)
        for arch in (QWEN_IMAGE, MINI):
            d_out, d_in = arch.modules[path].shape
            assert parse_keys({down: (4, d_in), up: (d_out, 4)}, "f").arch is arch


def test_a_model_of_a_known_family_at_another_size_needs_one_line():
    half = qwen_image("half", "Half", depth=2, hidden=64, latent=16, text=32)
    assert half.modules["transformer_blocks.1.img_mod.1"].shape == (384, 64)
    assert half.expanded(half.aliases)["transformer_blocks.1.attn.to_qkv"][0] == "transformer_blocks.1.attn.to_q"
