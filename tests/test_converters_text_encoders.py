"""The part of a LoRA file that changes a text encoder: kept where the target has names for it, and told either way."""

import json
import re

import pytest
import safetensors.torch
import torch

from i2l_ext.converters import Lora, UserError, inspect
from i2l_ext.converters.architectures import ARCHITECTURES
from i2l_ext.converters.scales import ADAPTER_METADATA
from test_converters_commands import i2l

CLIP, T5 = "text_model.encoder.layers.{}.self_attn.q_proj", "encoder.block.{}.layer.1.DenseReluDense.wi_0"
LLM = "model.layers.{}.mlp.gate_proj"
KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
NAMES = {  # model, key format -> (prefix, layer, flat) of each text encoder that it has names for
    ("flux", "webui"): [("text_encoders.clip_l.transformer.", CLIP), ("text_encoders.t5xxl.transformer.", T5)],
    ("flux", "kohya"): [("lora_te1_", CLIP), ("lora_te3_", T5)],
    ("flux", "diffusers"): [("text_encoder.", CLIP)],
    ("flux", "diffsynth"): [],
    ("qwen-image", "webui"): [("text_encoders.qwen25_7b.transformer.", LLM)],
    ("qwen-image", "kohya"): [],
    ("z-image", "webui"): [("text_encoders.qwen3_4b.transformer.", LLM)],
    ("z-image", "kohya-fused"): [],
    ("z-image", "diffusers"): [],
}
SOURCES = {
    "flux": {
        "kohya": [("lora_te1_", CLIP), ("lora_te3_", T5)],
        "OneTrainer": [("lora_te1_", CLIP), ("lora_te2_", T5)],
        "ComfyUI": [("text_encoders.clip_l.transformer.", CLIP), ("text_encoders.t5xxl.transformer.", T5)],
        "diffusers": [("text_encoder.", CLIP), ("text_encoder_2.", T5)],
    },
    "qwen-image": {"diffusers": [("text_encoder.", LLM.replace("model.", "model.language_model."))]},
    "z-image": {"kohya": [("lora_te_", LLM)], "diffusers": [("text_encoder.", LLM.removeprefix("model."))]},
}


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def write(path, arch_id, layers, *, alpha=None, dtype=torch.float32, metadata=None, model=True):
    """A file with one module of the model and two layers of each text encoder; {canonical name: update}."""
    module = next(iter(ARCHITECTURES[arch_id].i2l_modules), None) or next(reversed(ARCHITECTURES[arch_id].modules))
    d_out, d_in = ARCHITECTURES[arch_id].modules[module].shape
    tensors = {f"diffusion_model.{module}.lora_A.weight": random(2, d_in)} if model else {}
    tensors |= {f"diffusion_model.{module}.lora_B.weight": random(d_out, 2)} if model else {}
    updates = {}
    for number, (prefix, name) in enumerate(layers):
        for block in (0, 11):
            flat = prefix.endswith("_")
            stem = prefix + (name.format(block).replace(".", "_") if flat else name.format(block))
            down, up = random(3, 24 + block).to(dtype), random(16 + number, 3).to(dtype)
            tensors |= dict(zip((f"{stem}.{end}" for end in (KOHYA if flat else PEFT)), (down, up), strict=True))
            if alpha is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
            updates[number, block] = up.double() @ down.double()
    safetensors.torch.save_file(tensors, path, metadata)
    return updates


def text_updates(path, layers):
    """What a file says of text encoders, read by a reader of the test's own; alpha applied."""
    tensors = {key: t for key, t in safetensors.torch.load_file(path).items() if key.startswith(("text", "lora_te"))}
    found = {}
    for number, (prefix, name) in enumerate(layers):
        for block in (0, 11):
            flat = prefix.endswith("_")
            stem = prefix + (name.format(block).replace(".", "_") if flat else name.format(block))
            down, up = (tensors.pop(f"{stem}.{end}").double() for end in (KOHYA if flat else PEFT))
            alpha = tensors.pop(f"{stem}.alpha", torch.tensor(len(down)))
            found[number, block] = float(alpha) / len(down) * up @ down
    assert not tensors
    return found


@pytest.mark.parametrize(
    ("arch_id", "source", "to"),
    [(arch, source, to) for arch, to in NAMES for source in SOURCES[arch]],
)
def test_it_is_kept_where_the_target_has_names_for_it(tmp_path, capsys, arch_id, source, to):
    path, out = tmp_path / "f.safetensors", tmp_path / "o.safetensors"
    updates = write(path, arch_id, SOURCES[arch_id][source], alpha=1.5)
    assert i2l("convert", path, "--to", to, "-o", out) == 0
    told, kept = capsys.readouterr().err, NAMES[arch_id, to]
    found = text_updates(out, kept)
    for place, update in found.items():
        assert (update - 0.5 * updates[place]).norm() <= 1e-6 * update.norm()
    assert ("are kept" in told) == bool(kept)
    assert (f"not carried over: {to} has no names for them" in told) == (len(kept) < len(SOURCES[arch_id][source]))
    assert len(Lora.read(out)) >= 1


def test_its_scale_may_stand_in_the_header_and_its_dtype_is_kept(tmp_path):
    path, out = tmp_path / "f.safetensors", tmp_path / "o.safetensors"
    header = {"transformer.r": 2, "transformer.lora_alpha": 2, "text_encoder.r": 3, "text_encoder.lora_alpha": 6}
    layers = SOURCES["flux"]["diffusers"][:1]
    updates = write(
        path, "flux", layers, dtype=torch.bfloat16, metadata={ADAPTER_METADATA: json.dumps(header), "format": "pt"}
    )
    assert i2l("convert", path, "--to", "diffusers", "-o", out) == 0
    found = text_updates(out, layers)
    assert all(torch.equal(found[place], 2 * update) for place, update in updates.items())
    stored = safetensors.torch.load_file(out)
    assert {t.dtype for key, t in stored.items() if key.startswith("text_encoder")} == {torch.bfloat16}
    assert i2l("convert", path, "--to", "diffusers", "-o", out, "--overwrite", "--dtype", "fp32") == 0
    assert {tensor.dtype for tensor in safetensors.torch.load_file(out).values()} == {torch.float32}


def test_a_loss_of_its_part_to_fp16_is_told(tmp_path, capsys):
    path = tmp_path / "f.safetensors"
    write(path, "flux", SOURCES["flux"]["kohya"], alpha=1e-6)
    assert i2l("convert", path, "--dtype", "fp16", "-o", tmp_path / "o.safetensors") == 0
    assert re.search(r"fp16 has too few exponents.*% of (text_model\.encoder|encoder\.block)", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["rank", "merge"])
def test_other_commands_keep_it_or_say_so(tmp_path, capsys, command):
    path, out = tmp_path / "f.safetensors", tmp_path / "o.safetensors"
    updates = write(path, "flux", SOURCES["flux"]["ComfyUI"])
    assert i2l(command, path, "--rank", "1", "-o", out) == 0
    told = capsys.readouterr().err
    if command == "rank":
        found = text_updates(out, NAMES["flux", "webui"])
        assert all((found[place] - update).norm() <= 1e-6 * update.norm() for place, update in updates.items())
        assert "2 text-encoder layers (CLIP-L) are kept; 2 text-encoder layers (T5-XXL) are kept" in told
    else:
        assert not [key for key in safetensors.torch.load_file(out) if "text" in key]
        assert "2 text-encoder layers (CLIP-L) are not carried over" in told


def test_inspect_names_it(tmp_path, capsys):
    path = tmp_path / "f.safetensors"
    write(path, "flux", SOURCES["flux"]["kohya"])
    assert inspect(path).json()["text_encoders"] == {"CLIP-L": 2, "T5-XXL": 2}
    i2l("inspect", path)
    assert "text enc. layers of CLIP-L (2), T5-XXL (2)" in capsys.readouterr().out


def test_a_file_of_nothing_else_is_described(tmp_path):
    write(tmp_path / "f.safetensors", "flux", SOURCES["flux"]["kohya"], model=False)
    for command in ("inspect", "check", "convert"):
        with pytest.raises(UserError, match=r"text encoder only \(2 layers of a CLIP and 2 layers of a T5,"):
            i2l(command, tmp_path / "f.safetensors")


def test_what_does_not_fit_is_named_and_left_out(tmp_path, capsys):
    path, out = tmp_path / "f.safetensors", tmp_path / "o.safetensors"
    write(path, "flux", SOURCES["flux"]["ComfyUI"])
    tensors = safetensors.torch.load_file(path)
    stem = f"text_encoders.clip_l.transformer.{CLIP.format(0)}"
    tensors |= {f"{stem}.lora_A.weight": random(4, 24), "text_encoder.strange.lora_A.weight": random(1, 1)}
    safetensors.torch.save_file(tensors, path)
    assert i2l("convert", path, "-o", out) == 0
    assert "1 text-encoder layers (CLIP-L) are kept" in (told := capsys.readouterr().err)
    assert "3 text-encoder keys are not carried over: text_encoder.strange" in told
    assert not [key for key in safetensors.torch.load_file(out) if key.startswith(stem)]
