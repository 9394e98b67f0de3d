"""The commands on LoRA files, run as a user runs them."""

import argparse
import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from i2l_ext.commands import lora_files
from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.architectures import MINI

PATH = next(iter(MINI.i2l_modules))


def i2l(*args):
    """What `i2l ARGS` runs, in this process; a UserError is its exit code 1."""
    parser = argparse.ArgumentParser()
    lora_files.register(parser.add_subparsers(required=True))
    parsed = parser.parse_args([str(arg) for arg in args])
    return parsed.run(parsed)


def factors(path=PATH, rank=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    d_out, d_in = MINI.modules[path].shape
    return (
        torch.randn(rank, d_in, generator=generator).to(dtype),
        torch.randn(d_out, rank, generator=generator).to(dtype),
    )


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "style.safetensors"
    Lora.of(MINI, {module: factors(module) for module in MINI.i2l_modules}, {"ss_output_name": "style"}).save(path)
    return path


def test_inspect_json(whole, capsys):
    assert i2l("inspect", whole, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["arch"] == "mini"
    assert told["dialect"] == "webui"
    assert told["modules"] == len(MINI.i2l_modules)
    assert told["ranks"] == {"2": len(MINI.i2l_modules)}
    assert told["alphas"] == {"none": len(MINI.i2l_modules)}
    assert told["scales"] == {"1": len(MINI.i2l_modules)}
    assert told["dtype"] == "F32"
    assert told["finite"] is True
    assert told["missing"] == {} and told["foreign"] == [] and told["problems"] == []
    assert told["metadata"] == {"ss_output_name": "style"}


def test_inspect_names_what_is_wrong(tmp_path, capsys):
    down, up = factors()
    up[0, 0] = torch.nan
    stem = "lora_unet_" + PATH.replace(".", "_")
    tensors = {
        stem + ".lora_down.weight": down,
        stem + ".lora_up.weight": up,
        stem + ".alpha": torch.tensor(0.0),
        "lora_te_text_model.lora_up.weight": torch.ones(2, 2),
        "strange": torch.ones(1),
    }
    safetensors.torch.save_file(tensors, tmp_path / "f.safetensors", {"ss_network_module": "networks.lora_qwen_image"})
    assert i2l("inspect", tmp_path / "f.safetensors") == 0
    told = capsys.readouterr().out
    for part in (
        "alpha is 0",
        "NaN or infinity in 1 tensors",
        "1: strange",
        "1: lora_te_text",
        "musubi-tuner",
        "kohya",
    ):
        assert part in told
    assert i2l("inspect", tmp_path / "f.safetensors", "--header", "--json") == 0
    header = json.loads(capsys.readouterr().out)
    assert header["finite"] is None
    assert sum(header["missing"].values()) == len(MINI.i2l_modules) - 1


def test_inspect_needs_no_torch(whole):
    code = (
        "import argparse, sys; from i2l_ext.commands import lora_files; p = argparse.ArgumentParser();"
        "lora_files.register(p.add_subparsers()); a = p.parse_args(sys.argv[1:]); a.run(a);"
        "sys.exit('torch' in sys.modules)"
    )
    for extra in ([], ["--header"]):
        done = subprocess.run([sys.executable, "-c", code, "inspect", whole, *extra], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_convert_there_and_back(whole, capsys):
    assert i2l("convert", whole, "--to", "kohya", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(whole.with_name("style_kohya.safetensors"))
    assert (told["arch"], told["dialect"], told["rank"], told["modules"]) == ("mini", "kohya", 2, len(MINI.i2l_modules))
    assert i2l("convert", told["file"], "-o", whole.with_name("back.safetensors")) == 0
    first, last = (safetensors.torch.load_file(path) for path in (whole, whole.with_name("back.safetensors")))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)
    assert Lora.read(whole.with_name("back.safetensors")).metadata["ss_output_name"] == "back"


def test_convert_overwrites_only_when_told(whole):
    out = whole.with_name("out.safetensors")
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        i2l("convert", whole, "-o", out)
    assert out.read_text() == "mine"
    assert i2l("convert", whole, "-o", out, "--overwrite") == 0
    assert len(Lora.read(out)) == len(MINI.i2l_modules)


def test_convert_in_place(whole):
    assert i2l("convert", whole, "--to", "kohya", "-o", whole, "--overwrite") == 0
    assert Lora.read(whole).source.reading.dialect == "kohya"


def test_convert_selects_and_casts(whole, capsys):
    out = whole.with_name("out.safetensors")
    assert i2l("convert", whole, "-o", out, "--kinds", "attn", "--blocks", "0:0.5", "--dtype", "bf16") == 0
    lora = Lora.read(out)
    assert {MINI.modules[path].kind.name.split(".")[0] for path in lora.specs} == {"attn"}
    assert {spec.dtype for spec in lora.specs.values()} == {"BF16"}


def test_text_encoder_keys_are_named_not_dropped_in_silence(tmp_path, capsys):
    down, up = factors()
    tensors = {
        f"{PATH}.lora_A.weight": down,
        f"{PATH}.lora_B.weight": up,
        "text_encoder.layer.lora_A.weight": torch.ones(2, 2),
        "stranger.lora_A.weight": torch.ones(2, 2),
    }
    safetensors.torch.save_file(tensors, tmp_path / "f.safetensors")
    assert i2l("convert", tmp_path / "f.safetensors", "-o", tmp_path / "o.safetensors") == 0
    told = capsys.readouterr().err
    assert "1 text-encoder keys are not carried over: text_encoder.layer.lora_A.weight" in told
    assert "1 foreign keys are not carried over: stranger.lora_A.weight" in told


# wrong input: one line, nothing written


def many(count):
    """A file of empty tensors with LoRA names."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"t{index}.lora_A.weight": empty for index in range(count)}).encode()
    return len(text).to_bytes(8, "little") + text


DOWN, UP = factors()
GOOD = {f"{PATH}.lora_A.weight": DOWN, f"{PATH}.lora_B.weight": UP}
KOHYA = "lora_unet_" + PATH.replace(".", "_")
WRONG = {
    "not a LoRA": ({"model.weight": torch.ones(2)}, "not a LoRA"),
    "unknown architecture": (
        {"blocks.0.x.lora_A.weight": torch.ones(2, 7), "blocks.0.x.lora_B.weight": torch.ones(7, 2)},
        r"another model.*blocks\.0\.x.*\[2, 7\]",
    ),
    "Qwen-Image 2.x": (
        {f"{PATH}.lora_A.weight": torch.ones(2, 4096), f"{PATH}.lora_B.weight": torch.ones(4096, 2)},
        "not its shapes.*4096",
    ),
    "LoKr": (GOOD | {f"{PATH}.lokr_w1": torch.ones(2)}, "holds LoKr and LoRA, and one network"),
    "LoHa": (GOOD | {f"{PATH}.hada_w1_a": torch.ones(2)}, "holds LoHa and LoRA, and one network"),
    "DoRA": (GOOD | {f"{PATH}.dora_scale": torch.ones(2)}, r"its magnitude is \[2\]"),
    "duplicate module in two dialects": (
        GOOD | {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP},
        "two keys name the module",
    ),
    "alpha 0": (
        {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP, f"{KOHYA}.alpha": torch.tensor(0.0)},
        "alpha is 0",
    ),
    "NaN": ({f"{PATH}.lora_A.weight": DOWN, f"{PATH}.lora_B.weight": UP * torch.nan}, "NaN or infinity"),
    "fp8": ({key: tensor.to(torch.float8_e4m3fn) for key, tensor in GOOD.items()}, "fp8.*--dtype"),
    "half a module": ({f"{PATH}.lora_A.weight": DOWN}, "only one of its two factors"),
    "integers": ({key: tensor.int() for key, tensor in GOOD.items()}, "dtype I32"),
    "empty": (b"", "the file is empty"),
    "a header of 1 GB": ((1 << 30).to_bytes(8, "little") + b"{}", "cut short"),
    "a text": (b"this is not a LoRA at all", "not a usable safetensors file"),
    "100,000 tensors": (many(100_000), "100000 tensors"),
}
COMMANDS = {"convert": (), "rank": ("--rank", "2"), "merge": ()}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_input_gets_one_line_and_nothing_is_written(tmp_path, capsys, command, case):
    content, reason = WRONG[case]
    path = tmp_path / "wrong.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        safetensors.torch.save_file(
            {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in content.items()}, path
        )
    with pytest.raises(UserError, match=reason) as caught:
        i2l(command, path, *COMMANDS[command], "-o", tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["wrong.safetensors"]
    assert capsys.readouterr().out == ""


def test_fp8_is_widened_when_told(tmp_path):
    content = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in GOOD.items()}
    safetensors.torch.save_file(content, tmp_path / "fp8.safetensors")
    assert i2l("convert", tmp_path / "fp8.safetensors", "--dtype", "fp32", "-o", tmp_path / "out.safetensors") == 0
    down, up = Lora.read(tmp_path / "out.safetensors")[PATH]
    assert torch.equal(down, content[f"{PATH}.lora_A.weight"].float())
    assert torch.equal(up, content[f"{PATH}.lora_B.weight"].float())


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        i2l("inspect", tmp_path / "no.safetensors")
    with pytest.raises(UserError, match="cannot be"):
        i2l("inspect", tmp_path)
