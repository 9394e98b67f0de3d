"""SigLIP2 and DINOv3: the published structure, and what transformers' own whole-model forward gives."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from i2l_ext.encoders import dims, dinov3, qwen_vl, siglip2
from i2l_ext.encoders.keys import RENAMES, file_key
from i2l_ext.weights.compute import ComputeOptions
from i2l_ext.weights.structure import structure_md5
from small_encoders import DINOV3, SIGLIP, fetched, relative, save, weights

ROOT = Path(__file__).parent.parent
FP32 = ComputeOptions(dtype="float32")
BF16 = ComputeOptions(dtype="bfloat16")
ENCODERS = [("siglip2", siglip2, SIGLIP), ("dinov3", dinov3, DINOV3)]


@pytest.mark.parametrize(
    ("encoder", "real", "tensors", "parameters", "md5"),
    [
        (siglip2, dims.SIGLIP2_G384, 656, 1_163_659_776, "469c78b61e3e31bc9eec0d0af3d3f2f8"),
        (dinov3, dims.DINOV3_7B, 687, 6_716_035_072, "5722b5c873720009de96422993b15682"),
        (qwen_vl, dims.QWEN25_VL_7B, 729, 8_292_166_656, "8004730443f55db63092006dd9f7110e"),
    ],
    ids=["siglip2", "dinov3", "qwen_vl"],
)
def test_structure_of_the_real_checkpoints(encoder, real, tensors, parameters, md5):
    shapes = encoder.structure(real)
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters
    assert structure_md5(shapes) == md5


def test_structure_md5_ignores_order_and_sees_shapes():
    assert structure_md5({"a": (1, 2), "b": ()}) == structure_md5({"b": (), "a": (1, 2)})
    assert structure_md5({"a": (1, 2)}) != structure_md5({"a": (2, 1)})


def test_renames_are_one_to_one():
    for encoder, pairs in RENAMES.items():
        keys = [module + "x" for module, _ in pairs] + ["x", "lm_head.weight"]
        assert len({file_key(encoder, key) for key in keys}) >= len(keys) - (encoder == "siglip2")


def whole(name, module, small, path=None, dtype=torch.float32):
    """transformers' own model with the same weights as the file that is written to ``path``."""
    import transformers

    kind = {"siglip2": transformers.SiglipVisionModel, "dinov3": transformers.DINOv3ViTModel}[name]
    model = kind(module.config(small)).eval()
    tensors = weights({file_key(name, key): tuple(t.shape) for key, t in model.state_dict().items()})
    if path:
        save(path, tensors, dtype)
    model.load_state_dict({key: tensors[file_key(name, key)].to(dtype).float() for key in model.state_dict()})
    return model


def encode(module, path, small, pixels, run):
    (result,) = module.encode([path], small, [pixels], run)
    return result


def pictures(small, count=5):
    return torch.randn(count, 3, small.image, small.image, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "module", "small"), ENCODERS, ids=["siglip2", "dinov3"])
@pytest.mark.parametrize("disk", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_as_the_whole_model_in_fp32(tmp_path, name, module, small, disk):
    path = tmp_path / "model.safetensors"
    model = whole(name, module, small, path, disk)
    pixels = pictures(small)
    with torch.no_grad():
        theirs = model(pixels).pooler_output
    ours = encode(module, path, small, pixels, FP32)
    assert ours.shape == (5, small.width) and ours.dtype == torch.float32
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(("name", "module", "small"), ENCODERS, ids=["siglip2", "dinov3"])
def test_as_the_whole_model_in_bf16(tmp_path, name, module, small):
    path = tmp_path / "model.safetensors"
    model = whole(name, module, small, path).to(torch.bfloat16)
    pixels = pictures(small)
    with torch.no_grad():
        theirs = model(pixels.bfloat16()).pooler_output
    assert relative(encode(module, path, small, pixels, BF16), theirs) < 1e-2


@pytest.mark.parametrize(("name", "module", "small"), ENCODERS, ids=["siglip2", "dinov3"])
@pytest.mark.parametrize(("run", "bound"), [(FP32, 1e-5), (BF16, 1e-2)], ids=["fp32", "bf16"])
def test_a_picture_alone_and_in_a_batch(tmp_path, name, module, small, run, bound):
    path = tmp_path / "model.safetensors"
    whole(name, module, small, path)
    pixels = pictures(small)
    together = encode(module, path, small, pixels, run)
    alone = torch.cat([encode(module, path, small, one[None], run) for one in pixels])
    assert relative(alone, together) < bound
    assert relative(together[0], together[1]) > 1e-2  # pictures do tell


def test_dims_need_neither_torch_nor_transformers():
    code = (
        "import sys, i2l_ext.encoders.dims, i2l_ext.encoders.keys, i2l_ext.weights.structure; "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.strip() == "[]"


@pytest.mark.skipif("I2L_OLD_TRANSFORMERS" in os.environ, reason="this is that run")
def test_all_this_in_transformers_4(tmp_path):
    old = fetched("transformers-4.57.6", "transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(old), str(ROOT)]), "I2L_OLD_TRANSFORMERS": "4.57.6"}
    tests = [str(ROOT / "tests" / name) for name in ("test_encoders.py", "test_qwen_vl.py")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(tmp_path / "old"),
        *tests,
    ]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert answer.returncode == 0, answer.stdout[-3000:]


@pytest.mark.skipif("I2L_OLD_TRANSFORMERS" not in os.environ, reason="only in the run with another transformers")
def test_the_other_transformers_is_the_one_at_work():
    import transformers

    assert transformers.__version__ == os.environ["I2L_OLD_TRANSFORMERS"]
