"""`i2l make --each`: the same LoRAs as one by one, resumable, shared among processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from i2l_ext.batch import share_of_process
from i2l_ext.commands.main import main
from i2l_ext.converters.lora import Lora
from test_make import assert_same, deltas

HERE = Path(__file__).parent


@pytest.fixture
def folder(world, tmp_path):
    """Two pictures, and a sub-folder with two more."""
    folder = tmp_path / "styles"
    (folder / "pair").mkdir(parents=True)
    for picture, name in zip(world.pictures, ("a.png", "b.png", "pair/c.png"), strict=True):
        shutil.copy(picture, folder / name)
    shutil.copy(world.pictures[0], folder / "pair" / "d.png")
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    def run(*arguments, model="small"):
        arguments = ["--model", model, "--lora-dir", tmp_path / "Lora", "--precision", "fp32", *arguments]
        code = main(["make", "--each", str(folder), "--json", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


@pytest.mark.parametrize("model", ["small", "small-all"])
def test_each_is_what_it_is_alone(run, folder, tmp_path, capsys, model):
    code, made, _ = run(model=model)
    assert code == 0 and sorted(m["name"] for m in made) == ["a", "b", "pair"]
    for one in made:
        source = folder / "pair" if one["name"] == "pair" else folder / f"{one['name']}.png"
        alone = ["--lora-dir", tmp_path / "alone", "--precision", "fp32", "--json", "--model", model]
        assert main(["make", str(source), *map(str, alone)]) == 0
        single = json.loads(capsys.readouterr().out)
        assert one["rank"] == single["rank"] and one["images"] == single["images"]
        assert_same(deltas(one["file"]), deltas(single["file"]), 1e-4)


def test_what_is_made_is_not_made_again(run, tmp_path):
    run()
    (tmp_path / "Lora" / "b.safetensors").unlink()
    (tmp_path / "Lora" / "b.preview.png").unlink()
    (tmp_path / "Lora" / "b.json").unlink()
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "Lora").iterdir()}
    code, made, err = run()
    assert code == 0 and [m["name"] for m in made] == ["b"] and err.count("made before") == 2
    assert stamps.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "Lora").iterdir()}.items()


OTHERWISE = {
    "rank": ["--rank", "2"], "dtype": ["--dtype", "fp16"], "blocks": ["--blocks", "0-1"], "kinds": ["--kinds", "attn"],
    "key_format": ["--to", "kohya"], "strength": ["--strength", "0.5"], "model": ["--model", "small-all"],
}  # fmt: skip


@pytest.mark.parametrize("options", OTHERWISE.values(), ids=OTHERWISE)
def test_other_options_are_another_lora(run, tmp_path, options):
    run()
    file = tmp_path / "Lora" / "a.safetensors"
    before = file.read_bytes()
    code, made, err = run(*options)
    assert code == 1 and not made and err.count("made with other options") == 3 and "--overwrite" in err
    assert file.read_bytes() == before
    code, made, _ = run(*options, "--overwrite")
    assert code == 0 and len(made) == 3 and file.read_bytes() != before
    code, made, err = run(*options)
    assert code == 0 and not made and err.count("made before") == 3


def test_a_card_may_be_changed(run):
    run("--description", "mine", "--activation-text", "style")
    code, made, err = run("--description", "yours", "--host", "forge-neo")
    assert code == 0 and not made and err.count("made before") == 3


def test_what_a_conversion_wrote_is_not_what_was_made(run, tmp_path, capsys):
    run()
    file = tmp_path / "Lora" / "a.safetensors"
    assert main(["convert", str(file), "--to", "kohya", "-o", str(file), "--overwrite"]) == 0
    capsys.readouterr()
    code, _, err = run()
    assert code == 1 and "a.safetensors is another LoRA, or made with other options" in err


@pytest.mark.parametrize(
    ("options", "same"),
    [([], True), (["--rank", "4"], True), (["--rank", "2"], False), (["--dtype", "fp16"], False),
     (["--to", "kohya"], False), (["--blocks", "0-2"], False), (["--strength", "0.5"], False)],
)  # fmt: skip
def test_an_older_file_is_held_against_what_it_tells(run, tmp_path, options, same):
    run()
    file = tmp_path / "Lora" / "a.safetensors"
    lora = Lora.read(file)
    metadata = {key: value for key, value in lora.metadata.items() if key != "i2l.request"}
    lora.save(file, metadata=metadata, overwrite=True)
    _, _, err = run(*options)
    [told] = [line for line in err.splitlines() if line.startswith("i2l: a: ")]
    assert ("made before, as far as the file tells" in told) == same
    assert same or "made with other options" in told


def test_another_lora_of_that_name_is_not_touched(run, tmp_path):
    (tmp_path / "Lora").mkdir()
    (tmp_path / "Lora" / "a.safetensors").write_bytes(b"precious")
    code, made, err = run()
    assert code == 1 and sorted(m["name"] for m in made) == ["b", "pair"]
    assert "a.safetensors is another LoRA" in err and (tmp_path / "Lora" / "a.safetensors").read_bytes() == b"precious"


def test_what_fp16_loses_is_told_of_each(run, tmp_path):
    faint = ("--strength", 1e-6, "--dtype", "fp16")
    code, made, err = run(*faint)
    assert code == 1 and not made and not list((tmp_path / "Lora").glob("*.safetensors"))
    assert [f"i2l: {name}: {name}.safetensors: fp16 has too few" in err for name in ("a", "b", "pair")] == [True] * 3
    code, made, err = run(*faint, "--lossy")
    assert code == 0 and all(one["lost"] > 0.01 for one in made) and err.count("of its update is lost") == 3


def test_a_bad_picture_does_not_stop_the_others(run, folder):
    (folder / "b.png").write_text("not a picture")
    code, made, err = run()
    assert code == 1 and sorted(m["name"] for m in made) == ["a", "pair"] and "i2l: b: b.png" in err


def test_pictures_go_through_the_encoders_together(run, folder, monkeypatch):
    from i2l_ext.encoders import dinov3

    walks = []
    encode = dinov3.encode
    monkeypatch.setattr(dinov3, "encode", lambda p, d, b, *rest: walks.append(len(b[0])) or encode(p, d, b, *rest))
    run("--no-cache")
    assert walks == [4]


def test_shares_are_disjoint_and_complete():
    requests = list(range(23))
    parts = [share_of_process(requests, {"RANK": str(rank), "WORLD_SIZE": "4"}) for rank in range(4)]
    assert sorted(request for part in parts for request in part) == requests
    assert share_of_process(requests, {}) == requests


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is not Windows's")
def test_two_processes_of_accelerate_one_killed(folder, world, tmp_path):
    """Each makes its own; what the killed one leaves is made by the next run."""
    path = os.pathsep.join((str(HERE), str(HERE.parent)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    arguments = [HERE / "small_i2l.py", "make", "--each", folder, "--model", "small", "--lora-dir", tmp_path / "Lora"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    whole = subprocess.run(list(map(str, [*launch, *arguments])), env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert {p.stem for p in (tmp_path / "Lora").glob("*.safetensors")} == {"a", "b", "pair"}
    shutil.rmtree(tmp_path / "Lora")

    first = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**environment, "RANK": "0", "WORLD_SIZE": "2", "I2L_TEST_SLEEP": "60"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert first.stdout.readline() == "decoding\n"
    first.kill()
    first.wait()
    second = {**environment, "RANK": "1", "WORLD_SIZE": "2"}
    assert subprocess.run([sys.executable, *map(str, arguments)], env=second, capture_output=True).returncode == 0
    assert {p.stem for p in (tmp_path / "Lora").glob("*.safetensors")} == {"b"}
    again = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr.count("made before") == 1
    files = sorted((tmp_path / "Lora").glob("*.safetensors"))
    assert [p.stem for p in files] == ["a", "b", "pair"]
    assert all(len(Lora.read(file)) for file in files)
