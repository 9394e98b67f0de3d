"""The main job from pictures to file, on small models of every variant, through the command line."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from i2l_ext.commands.main import main
from i2l_ext.converters.architectures import Z_IMAGE
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TensorFile
from i2l_ext.converters.generation import Z_SETTINGS
from i2l_ext.converters.lora import Lora
from i2l_ext.models import catalogue
from i2l_ext.pipeline import shares_of

KEYS = {
    "file", "name", "model", "arch", "key_format", "rank", "modules", "bytes", "prompt", "preview", "sidecar", "images",
    "seconds", "settings",
}  # fmt: skip


def deltas(file):
    lora = Lora.read(file)
    return {path: lora.delta(path) for path in lora}


def assert_same(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert (ours[path] - theirs[path]).norm() <= tolerance * theirs[path].norm(), path


def test_the_authors_settings_stand_in_sidecar_and_result(make, monkeypatch, capsys):
    assert make()["settings"] is None
    monkeypatch.setitem(catalogue.MODELS, "small", replace(catalogue.MODELS["small"], settings=Z_SETTINGS))
    made = make("--name", "advised")
    assert (made["settings"]["cfg"], made["settings"]["shift"], made["settings"]["branch"]) == (4, 8, "positive")
    card = json.loads(Path(made["sidecar"]).read_text(encoding="utf-8"))
    assert card["negative text"] == Z_SETTINGS.negative_prompt
    assert card["notes"].startswith("Settings of the authors: 50 steps, cfg 4, shift 8, a negative prompt, the LoRA on")


def test_a_folder_that_was_not_there_is_told(make, world, tmp_path, capsys):
    """It may be a slip: the WebUI would not show what is in it."""
    arguments = ["make", str(world.pictures[0]), "--model", "small", "--lora-dir", str(tmp_path / "Lroa")]
    said = []
    for name in ("a", "b"):
        assert main([*arguments, "--name", name]) == 0
        said.append("there was no such folder, so it was made" in capsys.readouterr().err)
    assert said == [True, False]


def test_a_model_of_no_such_name_is_told_the_nearest(make):
    code, error = make(model="smal")
    assert code == 1 and "There is no model 'smal'. Did you mean small?" in error


def test_heads_of_ones_own(make, world, tmp_path, capsys):
    usual = make()
    path = tmp_path / "mine.safetensors"
    spec = catalogue.MODELS["small"].experts[0].heads.spec
    own = replace(spec, kind="compressed", compress=0, rank=3)
    save_file({key: torch.randn(shape) for key, shape in own.shapes.items()}, path)
    made = make("--heads", path, "--name", "own")
    assert (made["rank"], usual["rank"]) == (3, 4)
    with TensorFile(made["file"]) as file, TensorFile(usual["file"]) as other:
        assert file.header.metadata["i2l.heads"].startswith("heads-") and "i2l.heads" not in other.header.metadata
        assert file.header.metadata["i2l.request"] != other.header.metadata["i2l.request"]
    for change, told in (
        ({"embed": 7}, "take embeddings of 7"),
        ({"arch": Z_IMAGE}, "write for Z-Image"),
    ):
        wrong = replace(own, **change)
        save_file({key: torch.zeros(shape) for key, shape in wrong.shapes.items()}, path)
        code, error = make("--heads", path, "--name", "wrong")
        assert code == 1 and told in error and error.count("\n") == 1
    assert make("--heads", usual["file"], "--name", "wrong")[0] == 1
    assert make("--heads", tmp_path / "none.safetensors", "--name", "wrong")[0] == 1
    code, error = make("--heads", path, "--name", "wrong", model="small-all")
    assert code == 1 and "has several heads" in error


def test_one_picture(make, world):
    made = make()
    assert set(made) == KEYS
    assert made["prompt"] == "<lora:it:1>" and made["rank"] == 4 and made["arch"] == "mini"
    file = Path(made["file"])
    assert sorted(p.name for p in file.parent.iterdir()) == ["it.json", "it.preview.png", "it.safetensors"]
    tensors = load_file(file)
    assert len(tensors) == 2 * made["modules"] and made["bytes"] == file.stat().st_size
    assert all(key.startswith("diffusion_model.transformer_blocks.") for key in tensors)
    assert Image.open(made["preview"]).size == (512, 512)
    assert set(made["seconds"]) == {"encode", "decode", "save"}
    metadata = Lora.read(file).metadata
    assert metadata["ss_output_name"] == "it" and metadata["ss_network_dim"] == "4"
    assert not any(str(world.pictures[0].parent) in value for value in metadata.values())


def test_two_pictures_are_the_mean_of_each(make, world):
    single = [deltas(make(pictures=[picture])["file"]) for picture in world.pictures[:2]]
    both = make(pictures=world.pictures[:2])
    assert both["rank"] == 8
    assert_same(deltas(both["file"]), {path: (single[0][path] + single[1][path]) / 2 for path in single[0]})


def test_weights_and_strength_scale_the_update(make, world):
    single = [deltas(make(pictures=[picture])["file"]) for picture in world.pictures]
    made = make("--weights", 1, 1, 0.5, "--strength", 0.8, pictures=world.pictures)
    mean = {path: 0.8 * sum(w * s[path] for w, s in zip((0.4, 0.4, 0.2), single, strict=True)) for path in single[0]}
    assert_same(deltas(made["file"]), mean)
    assert [image["weight"] for image in made["images"]] == pytest.approx([0.4, 0.4, 0.2])


def test_strength_one_half_halves_the_update_of_every_expert_and_of_the_bias(make):
    whole, half = make(model="small-all"), make("--strength", 0.5, model="small-all")
    assert whole["rank"] == 4 + 4 + 2
    assert_same(deltas(half["file"]), {path: delta / 2 for path, delta in deltas(whole["file"]).items()})


@pytest.mark.parametrize("key_format", ["webui", "kohya", "diffusers", "diffsynth"])
def test_every_key_format_says_the_same(make, key_format):
    made = make("--to", key_format, "--name", key_format)
    assert made["key_format"] == key_format
    assert_same(deltas(made["file"]), deltas(make("--name", "plain")["file"]), 0)


def test_a_rank_and_a_part(make, world):
    whole = make("--name", "whole", pictures=world.pictures)
    low = make("--rank", 3, "--kinds", "attn", pictures=world.pictures)
    assert low["rank"] == 3 and 0 < low["modules"] < whole["modules"]
    full, cut = deltas(whole["file"]), deltas(low["file"])
    for path, delta in cut.items():
        rest = torch.linalg.svdvals(full[path])[3:]  # what the best approximation of rank 3 lacks
        assert "attn." in path
        assert (delta - full[path]).norm() == pytest.approx(float(rest.norm()), rel=1e-3)


def test_a_used_name_is_not_used_again_unless_one_insists(make):
    assert [make()["name"], make()["name"], make("--overwrite")["name"]] == ["it", "it-2", "it"]


def test_a_folder_and_a_dtype(make, world):
    made = make("--dtype", "bf16", pictures=[world.pictures[0].parent])
    assert len(made["images"]) == 3
    assert {tensor.dtype for tensor in load_file(made["file"]).values()} == {torch.bfloat16}


@pytest.mark.parametrize("model", ["small", "small-all"])
def test_what_fp16_loses_is_measured_told_and_refused_above_a_bound(make, tmp_path, model):
    faint = ("--strength", 1e-6, "--dtype", "fp16")
    code, said = make(*faint, model=model)
    assert code == 1 and re.search(
        r"it\.safetensors: fp16 .*% of its update is lost.*nothing was written.*--lossy", said
    )
    assert not list((tmp_path / "Lora").glob("*"))
    made, exact = make(*faint, "--lossy", model=model), make("--strength", 1e-6, "--dtype", "fp32", model=model)
    before, after = deltas(exact["file"]), deltas(made["file"])
    whole = sum(float(delta.double().square().sum()) for delta in before.values())
    lost = (sum(float((before[p] - after[p]).double().square().sum()) for p in before) / whole) ** 0.5
    assert lost > 0.01 and made["lost"] == pytest.approx(lost, rel=0.02)
    assert f"{made['lost']:.1%} of its update is lost" in made["loss"] and "lost" not in exact


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_in_fp8_make_what_they_make_widened(breakable, make, fp8):
    parts = ("small-coarse", "small-fine", "small-bias")
    stored = {part: load_file(breakable.file(part)) for part in parts}

    def made(dtype):
        for part in parts:
            tensors = {key: tensor.to(fp8).to(dtype) for key, tensor in stored[part].items()}
            save_file(tensors, breakable.file(part))
        return load_file(make("--overwrite", model="small-all")["file"])

    ours, theirs = made(fp8), made(torch.bfloat16)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, theirs[key])


def test_the_second_time_nothing_is_encoded(make, monkeypatch):
    first = deltas(make()["file"])
    from i2l_ext.encoders import dinov3, siglip2

    for room in (siglip2, dinov3):
        monkeypatch.setattr(room, "encode", lambda *_: pytest.fail("encoded again"))
    assert_same(deltas(make()["file"]), first, 0)
    with pytest.raises(pytest.fail.Exception):
        make("--no-cache")


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_shares_add_up_and_keep_proportions(weights):
    found = shares_of(weights, len(weights))
    assert sum(found) == pytest.approx(1)
    assert all(f * weights[0] == pytest.approx(found[0] * w) for f, w in zip(found, weights, strict=True))


@given(st.integers(1, 50), st.floats(0.01, 100))
def test_equal_weights_are_exactly_the_mean(count, weight):
    assert shares_of([weight] * count, count) == shares_of(None, count) == [1 / count] * count


@pytest.mark.parametrize("weights", [[0.0], [-1.0], [float("nan")], [float("inf")], [1.0, 1.0]])
def test_weights_that_make_no_sense(weights):
    with pytest.raises(UserError):
        shares_of(weights, 1)


def spoil(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "blocks.0.layers.0.proj_a.proj_in.weight"
SPOILT = {
    "a tensor is missing": (lambda p: spoil(p, lambda t: t.pop(KEY)), KEY),
    "a tensor has another shape": (lambda p: spoil(p, lambda t: t.update({KEY: t[KEY][:, 1:].clone()})), KEY),
    "NaN in the result": (lambda p: spoil(p, lambda t: t.update({KEY: t[KEY] * float("nan")})), "NaN"),
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "cut short"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_weights_are_named_and_nothing_is_left(breakable, make, tmp_path, how):
    change, said = SPOILT[how]
    change(breakable.file("small-style"))
    code, err = make()
    assert code == 1 and said in err and err.count("\n") == 1
    assert not (tmp_path / "Lora").exists() or not list((tmp_path / "Lora").iterdir())


def bomb(path):
    """A PNG header that claims 200 megapixels."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_text("not a picture"), "not PNG"),
        (bomb, "megapixels"),
        (lambda p: p.mkdir(), "no pictures"),
    ],
    ids=["missing", "empty", "text", "bomb", "empty folder"],
)
def test_pictures_that_cannot_be_used(make, tmp_path, write, said):
    picture = tmp_path / "bad.png"
    write(picture)
    code, err = make(pictures=[picture])
    assert code == 1 and said in err and err.count("\n") == 1
    assert not (tmp_path / "Lora").exists()


@pytest.mark.parametrize("name", ["a/b", "..", "a:b", "CON", "none", "", "a<b", "../up", "a\\b"])
def test_names_that_no_host_takes(make, tmp_path, name):
    code, err = make("--name", name)
    assert code == 1 and err.count("\n") == 1
    assert not (tmp_path / "Lora").exists()


def test_a_disk_that_fails_while_the_file_is_written(make, tmp_path, monkeypatch):
    """It is the weights' disk that fails, and that is what is said."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("i2l_ext.decoder.decode._Workers.make", fail)
    code, err = make()
    assert code == 1 and "model files cannot be read (Input/output error)" in err and "Cannot write" not in err
    assert not list((tmp_path / "Lora").glob("**/*"))


def test_a_folder_that_cannot_be_written(make):
    code, err = make("--lora-dir", "/proc/nowhere")
    assert code == 1 and "Cannot write" in err and err.count("\n") == 1


@pytest.mark.parametrize("model", ["qwen-image-fine", "qwen-image-bias", "nonesuch"])
def test_models_that_cannot_be_had(make, model):
    code, err = make(model=model)
    assert code == 1 and err.count("\n") == 1


def test_weights_that_are_not_here_are_told_with_their_size(make):
    code, err = make(model="qwen-image-style")
    assert code == 1 and "20.6 GB" in err and "i2l models download qwen-image-style" in err and "--model mini" in err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_an_interrupted_run_leaves_nothing(world, tmp_path):
    """Stopped while the file is being written: the run waits there for the signal."""
    command = ["make", world.pictures[0], "--name", "it", "--model", "small", "--lora-dir", tmp_path / "Lora"]
    path = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parent.parent)))
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("small_i2l.py")), *map(str, command)],
        env={**os.environ, "PYTHONPATH": path, "I2L_TEST_SLEEP": "600"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "decoding\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)  # one that did not listen would take ten minutes
    assert process.returncode == 130 and "nothing was left behind" in err and "Traceback" not in err
    assert not (tmp_path / "Lora").exists() or not list((tmp_path / "Lora").iterdir())


@pytest.mark.parametrize("each", [[], ["--each"]], ids=["one", "each"])
def test_a_missing_picture_is_told_before_a_missing_folder(world, tmp_path, monkeypatch, capsys, each):
    monkeypatch.chdir(tmp_path)
    assert main(["make", "no.png", "--model", "small", *each]) == 1
    assert capsys.readouterr().err.strip() == "i2l: no.png: no such file or folder."
    assert main(["make", str(world.pictures[0]), "--model", "small", *each]) == 1
    assert "Say where to save the LoRA: --lora-dir PATH." in capsys.readouterr().err


def test_a_python_without_the_packages_is_told_so_in_one_line(monkeypatch, capsys):
    def run(*_):
        raise ModuleNotFoundError("No module named 'platformdirs'", name="platformdirs.unix")

    monkeypatch.setattr("i2l_ext.commands.doctor.run_doctor", run, raising=True)
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("i2l: this Python lacks the package platformdirs. Run") and err.count("\n") == 1
    monkeypatch.setattr("i2l_ext.commands.doctor.run_doctor", lambda *_: __import__("i2l_ext.nothing"))
    with pytest.raises(ModuleNotFoundError):  # a fault of ours stays one
        main(["doctor"])
