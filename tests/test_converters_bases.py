"""`i2l check FILE --base BASE`: small checkpoints of every packing, as headers over holes."""

import json
import struct

import pytest
import torch

from i2l_ext.converters import Lora, UserError, bases, gguf
from i2l_ext.converters.architectures import ARCHITECTURES, FLUX, MINI, QWEN_IMAGE, Z_IMAGE
from i2l_ext.converters.bases import fits, read_base
from i2l_ext.converters.headers import BYTES
from i2l_ext.converters.spellings import native_layers
from test_converters_commands import i2l


def checkpoint(path, weights, metadata=None):
    """A safetensors file of {name: (dtype, shape)}: its data are a hole in the file."""
    header, end = {"__metadata__": metadata or {}}, 0
    for name, (dtype, shape) in weights.items():
        size = BYTES[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return path


def gguf_file(path, weights, metadata=(), version=3):
    """A GGUF file of {name: (type's number, shape)}: a header without data."""

    def text(said):
        return struct.pack("<Q", len(said.encode())) + said.encode()

    made = b"GGUF" + struct.pack("<IQQ", version, len(weights), len(metadata))
    made += b"".join(text(key) + value for key, value in metadata)
    for name, (kind, shape) in weights.items():
        made += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, 0)
    path.write_bytes(made)
    return path


def plain(arch, dtype="BF16"):
    return {f"{path}.weight": (dtype, module.shape) for path, module in arch.modules.items()}


def native(arch, dtype="BF16"):
    layers, made = native_layers(arch.id), {}
    for path, module in arch.modules.items():
        layer = layers.get(path)
        rows = sum(arch.modules[part].shape[0] for part in layer.paths) if layer else module.shape[0]
        made[f"{layer.name if layer else path}.weight"] = (dtype, (rows, module.shape[1]))
    return made


def comfy(weights):
    return {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}


def scaled(arch, dtype, suffix):
    made = plain(arch, dtype)
    return made | {name.replace(".weight", suffix): ("F32", ()) for name in made} | {"scaled_fp8": (dtype, (0,))}


def columns(arch):
    """bitsandbytes: a column of bytes, two weights each."""
    return {name: ("U8", (shape[0] * shape[1] // 2, 1)) for name, (_, shape) in plain(arch).items()}


def nvfp4(arch):
    made = {}
    for name, (_, (rows, width)) in plain(arch).items():
        made[name] = ("U8", (rows, width // 2))
        made[f"{name}_scale"] = ("F8_E4M3", (rows, width // 16))
    return made


def nunchaku(arch):
    """The layers of a block as Nunchaku stores them; the others as they are."""
    made = {}

    def svd(name, rows, width):
        made[f"{name}.qweight"] = ("I8", (rows, width // 2))
        made[f"{name}.proj_down"], made[f"{name}.proj_up"] = ("BF16", (width, 32)), ("BF16", (rows, 32))

    fused = {path: (name, paths) for name, paths in arch.expanded(arch.aliases).items() for path in paths}
    for path, module in arch.modules.items():
        rows, width = module.shape
        if module.block is None:
            made[f"{path}.weight"] = ("BF16", module.shape)
        elif "_mod." in path:
            made[f"{path}.qweight"] = ("I32", (rows // 4, width // 2))
        elif path in fused and fused[path][0].rpartition(".")[2] != "to_added_qkv":
            name, parts = fused[path]
            svd(name, sum(arch.modules[part].shape[0] for part in parts), width)
        elif path in fused:
            svd(fused[path][0].replace("to_added_qkv", "add_qkv_proj"), 3 * rows, width)
        else:
            svd(path, rows, width)
    return made


PACKINGS = {
    "bf16": (plain, QWEN_IMAGE, "BF16"),
    "ComfyUI": (lambda arch: comfy(plain(arch)), QWEN_IMAGE, "BF16"),
    "fp8": (lambda arch: plain(arch, "F8_E4M3"), QWEN_IMAGE, "F8_E4M3"),
    "scaled fp8": (lambda arch: scaled(arch, "F8_E4M3", ".scale_weight"), QWEN_IMAGE, "F8_E4M3, scaled"),
    "int8": (lambda arch: scaled(arch, "I8", ".weight_scale"), QWEN_IMAGE, "I8, scaled"),
    "NVFP4": (nvfp4, QWEN_IMAGE, "4 bit"),
    "bitsandbytes": (columns, QWEN_IMAGE, "4 bit"),
    "Nunchaku": (nunchaku, QWEN_IMAGE, "Nunchaku 4 bit"),
    "Nunchaku, Z-Image": (nunchaku, Z_IMAGE, "Nunchaku 4 bit"),
    "first implementation": (native, Z_IMAGE, "BF16"),
    "first implementation in ComfyUI": (lambda arch: comfy(native(arch)), Z_IMAGE, "BF16"),
    "FLUX": (native, FLUX, "BF16"),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_checkpoint_of_every_packing(tmp_path, packing):
    make, arch, stored = PACKINGS[packing]
    path = checkpoint(tmp_path / "base.safetensors", make(arch))
    known = [module for module in arch.modules if module != "norm_out.linear"]
    fit = fits(arch, known, read_base(path))
    assert (fit.status, fit.fitting, fit.missing, fit.misfits) == ("all", len(known), (), {})
    assert stored in fit.stored
    assert fit.base == f"{arch.title}, or a model with its layers"
    for other in ARCHITECTURES.values():
        if other.family != arch.family:  # no other model is taken to fit as a whole
            assert fits(other, other.modules, read_base(path)).status != "all"


@pytest.mark.parametrize("packing", [name for name in PACKINGS if PACKINGS[name][1] is QWEN_IMAGE])
def test_a_packed_layer_of_another_size_is_a_misfit(tmp_path, packing):
    """A twin of half the width, packed the same way."""
    from i2l_ext.converters.architectures import qwen_image

    twin = qwen_image("twin", "Twin", depth=2, hidden=1536, latent=64, text=3584)
    path = checkpoint(tmp_path / "base.safetensors", PACKINGS[packing][0](twin))
    blocks = [path for path, module in QWEN_IMAGE.modules.items() if module.block in (0, 2)]
    fit = fits(QWEN_IMAGE, blocks, read_base(path))
    assert fit.status == "nothing" and len(fit.misfits) == len(fit.missing) == 14


def test_a_folder_of_diffusers_with_shards(tmp_path):
    weights = list(plain(Z_IMAGE).items())
    folder = tmp_path / "Z-Image-Turbo" / "transformer"
    for number in (0, 1):
        name = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        shard = checkpoint(folder / name, dict(weights[number::2]))
    (folder / "config.json").write_text('{"_class_name": "ZImageTransformer2DModel"}')
    for base in (folder.parent, folder, shard):
        fit = fits(Z_IMAGE, Z_IMAGE.modules, read_base(base))
        assert fit.status == "all" and fit.base == "Z-Image-Turbo"
    assert any("Use Z-Image, not Turbo" in line for line in fit.advice)


NAMES = {
    "qwen_image_fp8_e4m3fn": "Qwen-Image",
    "qwen-image-2512-Q4_K_M": "Qwen-Image-2512",
    "qwen_image_edit_fp8": "Qwen-Image-Edit",
    "Qwen-Image-Edit-2509-Q8_0": "Qwen-Image-Edit-2509",
    "qwen_image_edit_2511_bf16": "Qwen-Image-Edit-2511",
    "qwen_image_layered_bf16": "Qwen-Image-Layered",
    "svdq-int4_r32-qwen-image-lightningv1.1": "Qwen-Image, distilled",
    "z_image_turbo_bf16": "Z-Image-Turbo",
    "zit_q8": "Z-Image-Turbo",
    "z_image_omni_base": "Z-Image-Omni-Base",
    "z_image_bf16": "Z-Image",
}


@pytest.mark.parametrize("name", NAMES)
def test_bases_that_are_known_by_name(tmp_path, name):
    arch = QWEN_IMAGE if "wen" in name else Z_IMAGE
    path = checkpoint(tmp_path / f"{name}.safetensors", plain(arch))
    fit = fits(arch, arch.modules, read_base(path))
    assert fit.base == NAMES[name] and fit.advice


def test_a_tensor_that_only_one_base_has_counts_before_the_name(tmp_path):
    extra = {"siglip_embedder.1.weight": ("BF16", (3840, 1152))}
    path = checkpoint(tmp_path / "z_image_turbo.safetensors", plain(Z_IMAGE) | extra)
    assert fits(Z_IMAGE, Z_IMAGE.modules, read_base(path)).base == "Z-Image-Omni-Base"
    folder = tmp_path / "mine"
    checkpoint(folder / "model.safetensors", plain(QWEN_IMAGE))
    (folder / "config.json").write_text('{"zero_cond_t": true}')
    assert fits(QWEN_IMAGE, QWEN_IMAGE.modules, read_base(folder)).base == "Qwen-Image-Edit-2511"


def test_another_base(tmp_path):
    path = checkpoint(tmp_path / "base.safetensors", native(FLUX))
    fit = fits(Z_IMAGE, Z_IMAGE.i2l_modules, read_base(path))
    assert (fit.status, fit.base, fit.fitting, fit.advice) == ("nothing", "FLUX.1", 0, ())
    layer = {"transformer_blocks.0.img_mlp.gate_layer.weight": ("BF16", (12288, 4096))}
    to_q = {"transformer_blocks.0.attn.to_q.weight": ("BF16", (4096, 4096))}
    path = checkpoint(tmp_path / "qwen_image_2.safetensors", layer | to_q)
    fit = fits(QWEN_IMAGE, ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"], read_base(path))
    assert fit.status == "nothing" and "Qwen-Image 2.x" in fit.base
    assert fit.misfits == {"transformer_blocks.0.attn.to_q": ((4096, 4096), (3072, 3072))}
    assert fit.missing == ("transformer_blocks.1.attn.to_q",)


def test_part_of_it(tmp_path):
    weights = {name: weight for name, weight in plain(QWEN_IMAGE).items() if "_blocks.59." not in name}
    fit = fits(QWEN_IMAGE, QWEN_IMAGE.i2l_modules, read_base(checkpoint(tmp_path / "b.safetensors", weights)))
    assert (fit.status, fit.fitting, len(fit.missing)) == ("part", 708, 12)


@pytest.mark.parametrize("form", ["ours", "native"])
def test_gguf(tmp_path, form):
    arch = Z_IMAGE
    weights = (plain if form == "ours" else native)(arch)
    said = [
        ("general.architecture", struct.pack("<IQ", 8, 6) + b"lumina"),
        ("general.quantization_version", struct.pack("<II", 4, 2)),
        ("tokens", struct.pack("<IIQ", 9, 8, 2) + struct.pack("<Q1sQ1s", 1, b"a", 1, b"b")),
        ("scores", struct.pack("<IIQ", 9, 6, 2) + bytes(8)),
    ]
    path = gguf_file(tmp_path / "z-image.gguf", {name: (12, shape) for name, (_, shape) in weights.items()}, said)
    fit = fits(arch, arch.modules, read_base(path))
    assert fit.status == "all" and fit.base == "Z-Image" and fit.stored == {"Q4_K": len(arch.modules)}
    assert gguf.read_gguf(path)[1] == {"general.architecture": "lumina"}


def test_gguf_as_the_package_writes_it(tmp_path):
    """By hand, where `pip install gguf` is to be had; the test above has a writer of its own."""
    package = pytest.importorskip("gguf")
    import numpy

    writer = package.GGUFWriter(tmp_path / "x.gguf", "flux")
    writer.add_array("names", ["a", "b"])
    writer.add_tensor("a.weight", numpy.zeros((6, 32), numpy.float16))
    kind = package.GGMLQuantizationType.Q8_0
    writer.add_tensor("b.weight", package.quantize(numpy.zeros((8, 64), numpy.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, said = gguf.read_gguf(tmp_path / "x.gguf")
    assert found == {"a.weight": ("F16", (6, 32)), "b.weight": ("Q8_0", (8, 64))}
    assert said["general.architecture"] == "flux"


HEAD = b"GGUF" + struct.pack("<I", 3)
BROKEN = {
    "not one": (b"GGML" + bytes(40), "not a GGUF file"),
    "empty": (b"", "cut short"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "tensors": (HEAD + struct.pack("<QQ", 1 << 40, 0), "more than 25000"),
    "values": (HEAD + struct.pack("<QQ", 0, 1 << 40), "more than 25000"),
    "a long name": (HEAD + struct.pack("<QQQ", 1, 0, 1 << 62), "cut short"),
    "a long array": (HEAD + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 4, 1 << 62), "cut short"),
    "a list of nothing": (HEAD + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 1 << 62), "cut short"),
    "an array of arrays": (HEAD + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 1), "unknown type"),
    "dimensions": (HEAD + struct.pack("<QQQ1sI", 1, 0, 1, b"t", 1 << 30), "dimensions"),
    "twice": (HEAD + struct.pack("<QQ", 2, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 0) * 2, "twice"),
    "no text": (HEAD + struct.pack("<QQQ1s", 1, 0, 1, b"\xff"), "not text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_gguf_file_may_come_from_anybody(tmp_path, case):
    raw, told = BROKEN[case]
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(UserError, match=rf"x\.gguf: .*{told}"):
        read_base(tmp_path / "x.gguf")


def test_what_is_no_base(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no \.safetensors or \.gguf file"):
        read_base(tmp_path / "empty")
    for name in ("none.safetensors", "none.gguf"):
        with pytest.raises(UserError, match="there is no such file"):
            read_base(tmp_path / name)
    for number in range(bases.MOST_SHARDS + 1):
        (tmp_path / f"m-{number:05}-of-00099.safetensors").touch()
    with pytest.raises(UserError, match="65 files"):
        read_base(tmp_path / "m-00001-of-00099.safetensors")


def test_no_data_are_read(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "base.safetensors", plain(QWEN_IMAGE))
    monkeypatch.setattr(bases.files.TensorFile, "read", None)
    assert path.stat().st_size > 40e9 and read_base(path).weights


def test_check_command(tmp_path, capsys):
    pairs = {}
    for path, module in QWEN_IMAGE.i2l_modules.items():
        if module.block == 0:
            pairs[path] = (torch.ones(1, module.shape[1]), torch.ones(module.shape[0], 1))
    Lora.of(QWEN_IMAGE, pairs).save(tmp_path / "lora.safetensors")
    base = checkpoint(tmp_path / "qwen_image_2512.safetensors", plain(QWEN_IMAGE, "F8_E4M3"))
    assert i2l("check", tmp_path / "lora.safetensors", "--base", base) == 0
    told = capsys.readouterr().out
    assert "base qwen_image_2512.safetensors: Qwen-Image-2512; F8_E4M3 (12)" in told
    assert "fits: 12 of 12 modules" in told and "Forge Neo" in told
    assert i2l("check", tmp_path / "lora.safetensors", "--base", base, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"]["status"] == "all" and found["base"]["file"] == str(base)
    assert i2l("check", tmp_path / "lora.safetensors", "--json") == 0
    assert "base" not in json.loads(capsys.readouterr().out)
    other = checkpoint(tmp_path / "other.safetensors", plain(Z_IMAGE))
    assert i2l("check", tmp_path / "lora.safetensors", "--base", other) == 0
    told = capsys.readouterr().out
    assert "does not fit: 0 of 12 modules" in told and "other.safetensors: Z-Image" in told


def test_a_miniatures_lora_fits_no_known_base(tmp_path):
    path = checkpoint(tmp_path / "qwen_image.safetensors", plain(QWEN_IMAGE))
    fit = fits(MINI, MINI.i2l_modules, read_base(path))
    assert fit.status == "nothing" and fit.base == "Qwen-Image"
