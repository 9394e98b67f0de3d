"""The commands on LoRA files, run as a user runs them."""

import argparse
import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from i2l_ext import requests
from i2l_ext.commands import lora_files
from i2l_ext.commands.main import main
from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.errors import Cancelled
from i2l_ext.converters.rank import resize, singular_values
from i2l_ext.operations import Context, Reporter, perform

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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("check", "no/where.safetensors"), "no/where.safetensors: there is no such file."),
        (("check", "style.safetensors", "--base", "path/to/base"), "path/to/base: there is no such file."),
        (("check", "style.safetensors", "--base=path/to/base"), "path/to/base: there is no such file."),
        (("merge", "no/where.safetensors:0.5", "style.safetensors"), "no/where.safetensors: there is no such file."),
        (("check", "no/style.safetensors", "--base", "style.safetensors"), "style.safetensors: there is no such file."),
        (("make", "no/where.png", "--model", "mini"), "no/where.png: no such file or folder."),
    ],
)  # fmt: skip
def test_a_file_that_is_not_there_is_told_as_it_was_typed(whole, monkeypatch, capsys, words, told):
    """Where two have that name, by its name only."""
    monkeypatch.chdir(whole.parent)
    assert main(words) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"i2l: {told}"


def test_a_command_that_is_missing_is_told_with_the_list_of_them(capsys):
    for words, names in (([], ("make", "check", "models", "ui")), (["cache"], ("show", "clear"))):
        with pytest.raises(SystemExit) as stop:
            main(words)
        first, *lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and first.startswith(" ".join(["i2l", *words]) + ": ")
        assert set(names) <= {line.split()[0] for line in lines} and all(len(line.split()) > 2 for line in lines)


def test_inspect_json(whole, capsys):
    assert i2l("inspect", whole, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["arch"] == "mini"
    assert told["key_format"] == "webui"
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
    assert (told["arch"], told["key_format"], told["rank"], told["modules"]) == (
        "mini",
        "kohya",
        2,
        len(MINI.i2l_modules),
    )
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
    assert Lora.read(whole).source.reading.key_format == "kohya"


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
    "Qwen-Image 2.x": (  # its attention has the names and shapes of FLUX.2 klein 9B
        {f"{PATH}.lora_A.weight": torch.ones(2, 4096), f"{PATH}.lora_B.weight": torch.ones(4096, 2)}
        | {"transformer_blocks.0.img_mlp.out.lora_A.weight": torch.ones(2, 12288)}
        | {"transformer_blocks.0.img_mlp.out.lora_B.weight": torch.ones(4096, 2)},
        "another model.*Qwen-Image 2.x",
    ),
    "other shapes": (
        {f"{PATH}.lora_A.weight": torch.ones(2, 5120), f"{PATH}.lora_B.weight": torch.ones(5120, 2)},
        "not its shapes.*5120",
    ),
    "LoKr": (GOOD | {f"{PATH}.lokr_w1": torch.ones(2)}, "holds LoKr and LoRA, and one network"),
    "LoHa": (GOOD | {f"{PATH}.hada_w1_a": torch.ones(2)}, "holds LoHa and LoRA, and one network"),
    "DoRA": (GOOD | {f"{PATH}.dora_scale": torch.ones(2)}, r"its magnitude is \[2\]"),
    "duplicate module in two key formats": (
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


def test_a_peft_folder_is_converted_beside_itself_and_alpha_is_for_files_that_say_none(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "style.v1"
    folder.mkdir()
    down, up = factors()
    tensors = {f"base_model.model.{PATH}.lora_A.weight": down, f"base_model.model.{PATH}.lora_B.weight": up}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    i2l("inspect", folder)
    assert "the file says none; PEFT has it in adapter_config.json" in capsys.readouterr().out
    assert i2l("convert", folder, "--alpha", 8) == 0
    assert torch.equal(Lora.read(tmp_path / "style.v1_webui.safetensors").delta(PATH), 4 * (up @ down))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": -8}')
    with pytest.raises(UserError, match=r"says its scale itself \(adapter_config\.json\)"):
        i2l("rank", folder, "--rank", 1, "--alpha", 8)
    monkeypatch.chdir(folder)
    assert i2l("convert", ".", "--to", "kohya") == 0
    assert torch.equal(Lora.read(tmp_path / "style.v1_kohya.safetensors").delta(PATH), -4 * (up @ down))
    with pytest.raises(UserError, match="not 0"):
        i2l("convert", folder, "--alpha", 0)


def test_what_a_file_has_twice_or_without_factors_is_said(tmp_path, capsys):
    from i2l_ext.converters.architectures import Z_IMAGE

    stem, tensors = "layers.0.attention.", {"layers.1.attention.to_q.alpha": torch.tensor(1.0)}
    for name, d_out in {"qkv": 3 * 3840, "to_q": 3840, "to_k": 3840, "to_v": 3840}.items():
        tensors |= {f"{stem}{name}.lora_A.weight": torch.ones(1, 3840), f"{stem}{name}.lora_B.weight": torch.ones(d_out, 1)}  # fmt: skip  # noqa: E501
    safetensors.torch.save_file(tensors, tmp_path / "f.safetensors")
    assert i2l("convert", tmp_path / "f.safetensors") == 0
    said = capsys.readouterr().err
    assert "2 keys are left out, because the file has their modules once more: layers.0.attention.qkv" in said
    assert "1 alphas are left out, because their modules have no factors: layers.1.attention.to_q.alpha" in said
    assert Lora.read(tmp_path / "f_webui.safetensors").arch is Z_IMAGE
    i2l("inspect", tmp_path / "f.safetensors", "--json")
    told = json.loads(capsys.readouterr().out)
    assert [len(told["doubled"]), told["stray_alphas"]] == [2, ["layers.1.attention.to_q.alpha"]]
    assert i2l("check", tmp_path / "f.safetensors") == 0


# what a narrow dtype loses, progress, threads


def scaled_style(path, down_scale, up_scale=1.0):
    """Factors of which all numbers are so many times as large as usual."""
    made = {module: factors(module) for module in list(MINI.i2l_modules)[:3]}
    Lora.of(MINI, {module: (down * down_scale, up * up_scale) for module, (down, up) in made.items()}).save(path)


def true_loss(before, after):
    one, two = Lora.read(before), Lora.read(after)
    whole = sum(float(one.delta(path).double().square().sum()) for path in one)
    return (sum(float((one.delta(p) - two.delta(p)).double().square().sum()) for p in one) / whole) ** 0.5


@pytest.mark.parametrize("command", [("convert",), ("rank", "--rank", "2"), ("merge",)])
def test_a_loss_to_fp16_is_measured_told_and_refused_above_a_bound(tmp_path, capsys, command):
    name, *more = command
    path, out = tmp_path / "f.safetensors", tmp_path / "o.safetensors"
    # resetting the rank moves the size into the up factors, so there it is the update that has to be small
    scaled_style(path, 3e-7, 1e-5 if name == "rank" else 1)
    order = [name, path, *more, "--dtype", "fp16", "-o", out]
    with pytest.raises(UserError, match=r"fp16.*% of its update is lost.*nothing was written.*--lossy") as caught:
        i2l(*order)
    assert [file.name for file in tmp_path.iterdir()] == ["f.safetensors"]
    assert i2l(*order, "--lossy", "--json") == 0
    told = capsys.readouterr()
    found = json.loads(told.out)["lost"]
    assert found > 0.01 and found == pytest.approx(true_loss(path, out), rel=0.02)
    assert f"{found:.1%} of its update is lost" in told.err and f"{found:.1%}" in str(caught.value)
    assert i2l(name, path, *more, "--dtype", "bf16", "-o", out, "--overwrite", "--json") == 0
    told = capsys.readouterr()
    assert "lost" not in json.loads(told.out) and told.err == ""


def test_a_loss_under_the_bound_is_told(tmp_path, capsys):
    scaled_style(tmp_path / "f.safetensors", 4e-6)
    assert i2l("convert", tmp_path / "f.safetensors", "--dtype", "fp16", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["lost"] > 0.0025 and "bf16 and fp32 keep it" in told.err


def test_usual_factors_lose_nothing_worth_telling(whole, capsys):
    assert i2l("convert", whole, "--dtype", "fp16", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["lost"] < 1e-3 and told.err == ""


def test_a_number_too_large_for_fp16_is_named(tmp_path):
    scaled_style(tmp_path / "f.safetensors", 1e6, 1e-6)
    with pytest.raises(UserError, match=r"too large for this dtype.*65504.*--dtype bf16 or fp32"):
        i2l("convert", tmp_path / "f.safetensors", "--dtype", "fp16", "--lossy")
    assert [file.name for file in tmp_path.iterdir()] == ["f.safetensors"]


class Watching(Reporter):
    """Keeps what it is told, and stops after so many reports."""

    def __init__(self, stop_after=None):
        self.told, self.shares, self.stop_after = [], [], stop_after

    def plan(self, steps):
        self.told.append([step.id for step in steps])

    def begin(self, step):
        self.told.append(step)

    def progress(self, share):
        self.shares.append(share)

    def cancelled(self):
        return self.stop_after is not None and len(self.shares) >= self.stop_after


def works(path, out):
    return {
        "convert": requests.ConvertRequest(path, "kohya", out),
        "rank": requests.RankRequest(path, 1, output=out),
        "effect_kept": requests.RankRequest(path, effect_kept=0.9, output=out),
        "merge": requests.MergeRequest((str(path), str(path)), output=out),
        "export": requests.ExportRequest(path, "diffusers", output=out),
        "curve": requests.RankCurveRequest(path),
    }


@pytest.mark.parametrize("work", works(None, None))
def test_progress_goes_from_nothing_to_all_and_a_stop_leaves_nothing(whole, work):
    request = works(whole, whole.with_name("out"))[work]
    stopped = Watching(stop_after=3)
    with pytest.raises(Cancelled):
        perform(request, Context(reporter=stopped))
    assert len(stopped.shares) == 3 and [file.name for file in whole.parent.iterdir()] == [whole.name]
    watching = Watching()
    perform(request, Context(reporter=watching))
    assert watching.told == [[request.kind], request.kind]
    assert watching.shares == sorted(watching.shares) and watching.shares[-1] == pytest.approx(1)
    assert len(watching.shares) >= len(MINI.i2l_modules)


@pytest.mark.parametrize("rank", [2, 200])
def test_small_factorizations_take_one_thread_and_the_number_is_restored(rank, monkeypatch):
    used, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: used.append(torch.get_num_threads()) or svd(*a, **k))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        lora = resize(Lora.of(MINI, {PATH: factors(rank=rank)}), 1)
        singular_values(Lora.of(MINI, {PATH: factors(rank=rank)}))
        lora[PATH]
        assert torch.get_num_threads() == 3
        with pytest.raises(UserError, match="NaN"):
            singular_values(Lora.of(MINI, {PATH: tuple(factor * torch.nan for factor in factors(rank=rank))}))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert used == [1 if rank == 2 else 3] * 2
