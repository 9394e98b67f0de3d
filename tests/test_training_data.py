"""The pictures of a start folder, and what each trainer's own description of them says by its documented contract."""

import ast
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import yaml
from PIL import Image

from i2l_ext.commands.lora_files import export_lines
from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.architectures import KLEIN_4B, MINI, QWEN_IMAGE, Z_IMAGE
from i2l_ext.converters.export import export
from i2l_ext.converters.start_folder import readme
from i2l_ext.converters.trainers import TRAINERS
from i2l_ext.converters.trainers.script import NOT_STARTED
from i2l_ext.operations import Context
from i2l_ext.operations.lora_files import ExportResult, export_lora
from i2l_ext.requests import ExportRequest
from test_trainers import read_config, style

COLOURS = ("red", "green", "blue")


def values_of(folder):
    """The texts at the top of train.py."""
    tree = ast.parse((folder / "train.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    return {node.targets[0].id: node.value.value for node in found}


def musubi(folder):
    """dataset/config_utils.py, 30c658c: `general` holds what every dataset may, and a dataset its folders."""
    config = read_config(folder / "dataset.toml")
    [one] = config["datasets"]
    assert set(config["general"]) <= {
        "resolution", "caption_extension", "batch_size", "enable_bucket", "bucket_no_upscale", "num_repeats",
    }  # fmt: skip
    assert set(one) == {"image_directory", "cache_directory", "num_repeats"}
    assert one["cache_directory"] != one["image_directory"] and config["general"]["resolution"] == [1024, 1024]
    return one["image_directory"], config["general"]["caption_extension"], one["num_repeats"] * 16


def ai_toolkit(folder):
    """toolkit/config_modules.py (DatasetConfig), 27a03a9; the trainer counts steps, not epochs."""
    process = read_yaml(folder)["config"]["process"][0]
    [data] = process["datasets"]
    return data["folder_path"], f".{data['caption_ext']}", process["train"]["steps"] // 3


def diffsynth(folder):
    """UnifiedDataset, 2.1.12: a JSON list of rows, whose pictures lie below the base path."""
    values = values_of(folder)
    rows = json.loads(Path(values["METADATA"]).read_text(encoding="utf-8"))
    assert rows == [{"image": f"{number}.png", "prompt": "my word"} for number in (1, 2, 3)]
    return values["DATASET"], ".txt", int(re.search(r"'--dataset_repeat', '(\d+)'", script(folder))[1]) * 16


def simpletuner(folder):
    """DATALOADER.md, bc8e6ab: a backend of pictures and one, the default, of prompts."""
    config = read_config(folder / "config.json")
    pictures, prompts = json.loads(Path(config["data_backend_config"]).read_text(encoding="utf-8"))
    assert prompts["dataset_type"] == "text_embeds" and prompts["default"] is True
    assert pictures["caption_strategy"] == "textfile" and pictures["id"] != prompts["id"]
    return pictures["instance_data_dir"], ".txt", config["max_train_steps"] // 3


def onetrainer(folder):
    """ConceptConfig, 23df383: `sample` reads the text file beside a picture; balancing counts repeats."""
    config = read_config(folder / "config.json")
    [concept] = json.loads(Path(config["concept_file_name"]).read_text(encoding="utf-8"))
    assert (concept["__version"], concept["text"]["prompt_source"]) == (2, "sample")
    assert concept["balancing_strategy"] == "REPEATS"
    return concept["path"], ".txt", concept["balancing"] * config["epochs"]


def diffusion_pipe(folder):
    """utils/dataset.py, 8f83dbf: a picture with an empty caption is left out unless it is told otherwise."""
    config = read_config(folder / "config.toml")
    data = read_config(Path(config["dataset"]))
    assert data["skip_empty_caption"] is False and data["resolutions"] == [1024]
    [directory] = data["directory"]
    return directory["path"], ".txt", directory["num_repeats"] * config["epochs"]


def flymyai(folder):
    """image_datasets/dataset.py, c092784: .jpg and .png, each with a file of the caption type."""
    config = read_yaml(folder)
    assert {name.suffix for name in Path(config["data_config"]["img_dir"]).iterdir()} <= {".jpg", ".png", ".txt"}
    return config["data_config"]["img_dir"], f".{config['data_config']['caption_type']}", config["max_train_steps"] // 3


def diffusers(folder):
    """DreamBoothDataset: every file in the folder is opened as a picture; one prompt for all."""
    values = values_of(folder)
    assert values["PROMPT"] == "my word" and not list(Path(values["DATASET"]).glob("*.txt"))
    return values["DATASET"], None, int(re.search(r"'--max_train_steps', '(\d+)'", script(folder))[1]) // 3


def read_yaml(folder):
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def script(folder):
    return (folder / "train.py").read_text(encoding="utf-8")


CONTRACTS = {
    "musubi-tuner": musubi, "ai-toolkit": ai_toolkit, "diffsynth": diffsynth, "simpletuner": simpletuner,
    "onetrainer": onetrainer, "diffusion-pipe": diffusion_pipe, "flymyai": flymyai, "diffusers": diffusers,
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_nothing_is_left_to_fill_in_but_the_base(tmp_path, trainer):
    """The pictures, their captions, and a run of about 2000 steps; only the base model may be missing."""
    folder = tmp_path / "ü start"
    pictures = {
        f"{number}.png": lambda path, colour=colour: Image.new("RGB", (64, 48), colour).save(path)
        for number, colour in enumerate(COLOURS, 1)
    }
    told = export(style(MINI), trainer, 2, folder, pictures=pictures, caption="my word")
    found, ending, shown = CONTRACTS[trainer](folder)
    assert Path(found) == Path(told.dataset) == folder / "pictures" and told.pictures == 3
    assert len(list(Path(found).glob("*.png"))) == 3 and 500 <= shown <= 800
    for number in (1, 2, 3) if ending else ():
        assert (Path(found) / f"{number}{ending}").read_text(encoding="utf-8") == "my word"
    left = [line for file in told.files for line in (folder / file).read_text(encoding="utf-8").splitlines()
            if "path/to/" in line and "in line" not in line]  # fmt: skip
    assert bool(left) == (not TRAINERS[trainer].downloads)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "3 in `pictures/`" in text and "`my word`" in text
    again = export(style(MINI), trainer, 2, folder, pictures=pictures, overwrite=True)
    assert Path(again.dataset) == folder / "pictures-2" and len(list((folder / "pictures").iterdir())) >= 3


def test_ai_toolkit_draws_samples_on_its_way(tmp_path):
    """With the prompts of two pictures, and with one that shows something else; each is text, whatever is in it."""
    pictures = {f"{n}.png": Image.new("RGB", (64, 48)).save for n in range(4)}
    captions = {"0.png": 'a "red": #house', "1.png": "zwei Äpfel", "2.png": "a boat"}
    for caption, own, expected in (
        ("my word", captions, [*list(captions.values())[:2], "my word, a lighthouse by the sea"]),
        ("my word", {}, ["my word", "my word, a lighthouse by the sea"]),
        ("", {}, ["a lighthouse by the sea"]),
    ):
        export(style(MINI), "ai-toolkit", 2, tmp_path, pictures=pictures, caption=caption, captions=own, overwrite=True)
        [process] = read_yaml(tmp_path)["config"]["process"]
        assert process["sample"]["prompts"] == expected
        assert process["sample"]["sampler"] == process["train"]["noise_scheduler"] == "flowmatch"
        assert process["sample"]["sample_every"] == process["save"]["save_every"]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_base_that_was_found_is_filled_in(tmp_path, trainer):
    home = tmp_path / "Qwen Image"
    for part in ("transformer", "vae", "text_encoder"):
        (home / part).mkdir(parents=True)
        (home / part / "diffusion_pytorch_model.safetensors").touch()
    bases = {part: home / part / "diffusion_pytorch_model.safetensors" for part in ("transformer", "vae")}
    bases |= {"folder": home, "text_encoder": home / "text_encoder/diffusion_pytorch_model.safetensors"}
    told = export(style(MINI), trainer, 2, tmp_path / "out", bases=bases)
    texts = "".join((tmp_path / "out" / file).read_text(encoding="utf-8") for file in told.files)
    assert str(home) in texts and not re.search(r"path/to/(?!dataset)[\w.]", texts.replace("path/to/' in", ""))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A LoRA that four pictures made; three of them are still among the uploads."""
    monkeypatch.setenv("I2L_STATE", str(tmp_path / "state"))
    uploads = tmp_path / "state/uploads"
    uploads.mkdir(parents=True)
    red = Image.new("RGB", (30, 20), "red")
    red.save(tmp_path / "plain.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    red.save(tmp_path / "turned.jpg", exif=turned)
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.webp")
    digests = []
    for name in ("plain.jpg", "turned.jpg", "clear.webp"):
        data = (tmp_path / name).read_bytes()
        digests.append(hashlib.sha256(data).hexdigest())
        (uploads / digests[-1]).write_bytes(data)
    images = json.dumps([{"sha256": digest, "weight": 1} for digest in [*digests, "0" * 64]])
    file = tmp_path / "style.safetensors"
    style(MINI).save(file, metadata={"i2l.model": "mini", "i2l.strength": "1", "i2l.images": images})
    return file


def test_the_pictures_that_made_it_lie_there_as_they_were_seen(made, tmp_path):
    """A plain JPEG is copied byte by byte; what a trainer would see lying or on black becomes a PNG, as we saw it."""
    made.with_suffix(".json").write_text(json.dumps({"activation text": "my word"}))
    told = export_lora(ExportRequest(made, "musubi-tuner", 2, tmp_path / "out"), Context()).written
    assert sorted(path.name for path in Path(told.dataset).glob("*.[jp][pn]g")) == ["1.jpg", "2.png", "3.png"]
    assert (Path(told.dataset) / "1.jpg").read_bytes() == (tmp_path / "plain.jpg").read_bytes()
    assert Image.open(Path(told.dataset) / "2.png").size == (20, 30)
    assert Image.open(Path(told.dataset) / "3.png").getpixel((0, 0)) == (255, 255, 255)
    assert told.caption == (Path(told.dataset) / "3.txt").read_text() == "my word"


def test_a_square_that_made_it_is_what_is_trained_on(made, tmp_path):
    digest = hashlib.sha256((tmp_path / "turned.jpg").read_bytes()).hexdigest()
    for name, crop in (("inside", "2,10,16"), ("outside", "10,10,16")):
        images = json.dumps([{"sha256": digest, "weight": 1, "crop": crop}])
        metadata = {"i2l.model": "mini", "i2l.strength": "1", "i2l.images": images}
        style(MINI).save(tmp_path / f"{name}.safetensors", metadata=metadata)
    request = ExportRequest(tmp_path / "inside.safetensors", "musubi-tuner", 2, tmp_path / "out")
    assert Image.open(Path(export_lora(request, Context()).written.dataset) / "1.png").size == (16, 16)
    with pytest.raises(UserError, match="does not lie inside"):
        export_lora(ExportRequest(tmp_path / "outside.safetensors", "diffsynth", 2, tmp_path / "no"), Context())


def test_pictures_that_are_gone_are_told_and_others_may_be_named(made, tmp_path, capsys):
    from i2l_ext.operations.bars import Bars

    export_lora(ExportRequest(made, "musubi-tuner", 2, tmp_path / "a"), Context(reporter=Bars()))
    assert "1 of the 4 pictures that made the LoRA are not here" in capsys.readouterr().err
    request = ExportRequest(made, "musubi-tuner", 2, tmp_path / "b", pictures=(tmp_path / "plain.jpg",), caption="x")
    told = export_lora(request, Context()).written
    assert (told.pictures, told.caption) == (1, "x")
    (tmp_path / "state/uploads").joinpath(hashlib.sha256(b"").hexdigest()).touch()
    with pytest.raises(UserError, match="no such file"):
        export_lora(ExportRequest(made, "diffsynth", 2, tmp_path / "c", pictures=(tmp_path / "none",)), Context())
    assert not (tmp_path / "c").exists()


def test_a_changed_upload_is_not_taken(made, tmp_path):
    for path in (tmp_path / "state/uploads").iterdir():
        path.write_bytes(path.read_bytes() + b"more")
    told = export_lora(ExportRequest(made, "musubi-tuner", 2, tmp_path / "out"), Context()).written
    assert told.pictures == 0 and "path/to/dataset" in (tmp_path / "out/dataset.toml").read_text()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_users_own_captions_are_the_prompts(tmp_path, trainer):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.jpg", "b.png", "c.png"):
        Image.new("RGB", (30, 20), "red").save(pictures / name)
    (pictures / "a.txt").write_bytes("\ufeffa red wall,\nat noon – 图\n".encode())
    (pictures / "b.txt").write_text("")
    style(MINI).save(tmp_path / "style.safetensors")
    (tmp_path / "style.json").write_text(json.dumps({"activation text": "my word"}))

    def prompts(folder, **more):
        request = ExportRequest(tmp_path / "style.safetensors", trainer, 2, folder, pictures=(pictures,), **more)
        told = export_lora(request, Context()).written
        said = "\n".join(export_lines(ExportResult(told)))
        if trainer == "diffsynth":
            found = [row["prompt"] for row in json.loads((folder / "metadata.json").read_text(encoding="utf-8"))]
        else:
            texts = sorted(Path(told.dataset).glob("*.txt"))
            found = [text.read_text(encoding="utf-8") for text in texts] or values_of(folder)["PROMPT"]
        return found, told.captions, said

    found, count, said = prompts(tmp_path / "own")
    assert count == 2
    if trainer == "diffusers":
        assert found == "my word" and "your 2 captions are not used" in said
    else:
        assert found == ["a red wall,\nat noon – 图", "", "my word"]
        assert "2 with the caption that lay beside them as a .txt file, 1 with the prompt `my word`" in said
    found, count, said = prompts(tmp_path / "asked", caption="x")
    assert (found, count) == ("x" if trainer == "diffusers" else ["x"] * 3, 0) and "lay beside them" not in said
    assert "2 .txt captions beside the pictures were not used: `--caption` replaces them." in said
    assert "no caption for" not in said
    (tmp_path / "style.json").unlink()
    _, _, said = prompts(tmp_path / "lacking")
    lacking = "a.jpg (here `1.jpg`), b.png (here `2.png`), " if trainer == "diffusers" else ""
    assert f"**Warning: no caption for {lacking}c.png (here `3.png`): the prompt is empty." in said
    assert "no caption for" in (tmp_path / "lacking/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("data", "match"), [(b"\xff\xfe\x00a", "is not UTF-8"), (b"a" * 20_000, "too long")])
def test_a_caption_that_is_none_is_told_by_its_name(tmp_path, data, match):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_bytes(data)
    style(MINI).save(tmp_path / "style.safetensors")
    request = ExportRequest(
        tmp_path / "style.safetensors", "musubi-tuner", 2, tmp_path / "out", pictures=(tmp_path / "a.jpg",)
    )
    with pytest.raises(UserError, match=rf"a\.txt: .*{match}"):
        export_lora(request, Context())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("trainer", "arch", "said"),
    [("musubi-tuner", Z_IMAGE, "kohya keys; `i2l convert FILE --to webui -o"),
     ("musubi-tuner", KLEIN_4B, "kohya-fused keys; `i2l convert FILE --to webui-fused -o"),
     ("ai-toolkit", KLEIN_4B, "webui-fused keys, as ComfyUI and WebUIs read them")],
)  # fmt: skip
def test_what_a_run_saves_is_converted_to_what_comfyui_reads(tmp_path, trainer, arch, said):
    paths = [next(path for path in arch.modules if path.endswith(f".to_{part}")) for part in "qkv"]
    export(style(arch, paths=paths), trainer, None, tmp_path / "out")
    assert said in (tmp_path / "out/README.md").read_text(encoding="utf-8").splitlines()[-1]


def test_where_the_base_was_looked_for_is_told(tmp_path):
    lora = style(QWEN_IMAGE, paths=["transformer_blocks.0.attn.to_q"])
    lora.save(tmp_path / "style.safetensors")
    for models, told in (
        ((), "; `--models` names more folders; "),
        ((tmp_path,), "; nor in the folders of `--models`; "),
    ):
        request = ExportRequest(
            tmp_path / "style.safetensors", "musubi-tuner", 2, tmp_path / f"out{len(models)}", models=models
        )
        said = "\n".join(export_lines(export_lora(request, Context())))
        assert "not found in the caches of Hugging Face and ModelScope, the models folder" in said and told in said


def test_a_lora_of_few_modules_is_told(tmp_path):
    few = [f"transformer_blocks.0.attn.to_{part}" for part in ("q", "k", "v", "out.0")]
    said, _, _ = told_of(style(QWEN_IMAGE, paths=few), "musubi-tuner", tmp_path / "few")
    assert "**Warning: the LoRA has only 4 of the 840 modules that musubi-tuner trains by default" in said
    said, _, _ = told_of(style(QWEN_IMAGE, paths=few), "musubi-tuner", tmp_path / "filled", fill=True)
    assert "only 4 of the 840 modules" in said
    said, _, _ = told_of(style(MINI), "musubi-tuner", tmp_path / "enough")
    assert "modules that musubi-tuner trains by default" not in said


def told_of(lora, trainer, folder, **more):
    """What an export says, and the texts that it wrote."""
    written = export(lora, trainer, more.pop("rank", 3), folder, **more)
    texts = {file: (folder / file).read_text(encoding="utf-8") for file in written.files}
    return "\n".join(export_lines(ExportResult(written))), written, texts


@pytest.mark.parametrize("trainer", TRAINERS)
def test_all_written_files_and_all_blanks_are_told(tmp_path, trainer):
    lora = style(QWEN_IMAGE, paths=["transformer_blocks.0.attn.to_q"])
    said, written, texts = told_of(lora, trainer, tmp_path / "out")
    assert set(written.names) == {path.name for path in (tmp_path / "out").iterdir()}
    assert all(name in said.splitlines()[0] for name in written.names)
    blanks = {file: set(re.findall(r"path/to/\w[\w./-]*", text)) for file, text in texts.items()}
    assert {file: set(paths) for file, paths in written.blanks.items()} == {f: b for f, b in blanks.items() if b}
    assert f"To fill in: {written.to_fill_in}\n" in said and "path/to/dataset" in written.to_fill_in
    assert "export again where it is to be" in said
    ran = subprocess.run([sys.executable, tmp_path / "out/train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == NOT_STARTED  # and train.py tells all of them at once
    assert all(path in ran.stderr for paths in written.blanks.values() for path in paths)
    with_pictures = {"1.png": Image.new("RGB", (8, 8)).save}
    said, written, _ = told_of(lora, trainer, tmp_path / "more", pictures=with_pictures)
    assert "pictures/" in written.names and ("To fill in" in said) == bool(written.blanks)


@pytest.mark.parametrize(
    ("trainer", "option", "epochs"),
    [("musubi-tuner", "num_repeats = 16", 16), ("diffusion-pipe", "num_repeats = 5", 50), ("diffsynth", "", 16),
     ("onetrainer", "", 50)],
)  # fmt: skip
def test_how_often_to_show_a_picture_is_said_where_they_are_not_known(tmp_path, trainer, option, epochs):
    said, _, texts = told_of(style(MINI), trainer, tmp_path / "out")
    assert f"2000 steps / ({epochs} epochs x your pictures)" in (texts["dataset.toml"] if option else said)
    assert not option or f"{option}  # for 8 pictures" in texts["dataset.toml"]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_run_saves_a_folded_scale_and_a_weak_start_are_told(tmp_path, trainer):
    said, written, _ = told_of(style(MINI), trainer, tmp_path / "whole")
    home = TRAINERS[trainer].results.format(name=written.name)
    assert f"saves `{home}` in the trainer's folder, {written.key_format} keys" in said.splitlines()[-1]
    assert ("--to webui" in said.splitlines()[-1]) == (TRAINERS[trainer].key_format != "webui")
    assert "**Warning" not in said and "alpha was" not in said
    said = readme(TRAINERS[trainer], replace(written, kept={"all": 0.52}))
    assert "**Warning: effect kept: only 52.00% at rank 3, so the run starts from a weaker style." in said
    style(MINI).save(tmp_path / "half.safetensors", "kohya")
    tensors = safetensors.torch.load_file(tmp_path / "half.safetensors")
    tensors = {key: value / 2 if key.endswith(".alpha") else value for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "half.safetensors")
    said, _, _ = told_of(Lora.read(tmp_path / "half.safetensors"), trainer, tmp_path / "folded")
    assert "In the file alpha was 0.5 of the rank. That is multiplied in: here alpha is the rank." in said
