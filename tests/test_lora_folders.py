"""check, convert and rank over a whole folder: one bad file stops nothing."""

import json

import pytest
import torch

from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.architectures import MINI, QWEN_IMAGE
from i2l_ext.converters.errors import Cancelled
from i2l_ext.operations import Context, Reporter
from i2l_ext.operations.lora_folders import for_each_file, is_for_folder
from i2l_ext.requests import ConvertRequest, ExportRequest, InspectRequest
from test_converters_commands import factors, i2l


def style(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Lora.of(MINI, {module: factors(module) for module in list(MINI.i2l_modules)[:4]}).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three LoRAs, one of them in a sub-folder, one file that is none, and what is not looked at."""
    place = tmp_path / "loras"
    for name in ("a.safetensors", "c.safetensors", "sub/d.safetensors", ".hidden/e.safetensors"):
        style(place / name)
    (place / "b.safetensors").write_bytes(b"no LoRA")
    (place / "notes.txt").write_text("no LoRA")
    return place


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_convert_writes_all_but_the_bad_one(folder, capsys):
    out = folder.parent / "new" / "out"
    assert i2l("convert", folder, "--to", "kohya", "-o", out, "--json") == 1
    told = capsys.readouterr()
    assert written(out) == ["a.safetensors", "c.safetensors", "sub/d.safetensors"]
    assert {Lora.read(path).read_from.reading.key_format for path in out.rglob("*.safetensors")} == {"kohya"}
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert [line["file"] for line in lines] == [
        str(out / "a.safetensors"), "b.safetensors", str(out / "c.safetensors"), str(out / "sub/d.safetensors"),
    ]  # fmt: skip
    assert "not a usable safetensors file" in lines[1]["error"] and lines[1]["code"] == "invalid"
    assert [line for line in told.err.splitlines() if line.startswith("i2l: b.safetensors: not a usable")]
    assert told.err.count("b.safetensors") == 1


def test_rank_tells_a_summary_and_succeeds(folder, capsys):
    (folder / "b.safetensors").unlink()
    assert i2l("rank", folder, "--rank", "1", "-o", folder / "small") == 0
    assert {Lora.read(path).rank for path in (folder / "small").rglob("*.safetensors")} == {1}
    assert capsys.readouterr().out.splitlines()[-1] == "3 of 3 LoRAs done"
    assert i2l("rank", folder, "--rank", "1", "-o", folder / "small", "--overwrite") == 0  # what it wrote is no input
    assert len(written(folder / "small")) == 3


def test_check_tells_a_line_a_file_and_who_loads_how_many(folder, capsys):
    path = next(iter(QWEN_IMAGE.i2l_modules))
    d_out, d_in = QWEN_IMAGE.modules[path].shape
    for name in ("a.safetensors", "q.safetensors"):
        Lora.of(QWEN_IMAGE, {path: (torch.ones(1, d_in), torch.ones(d_out, 1))}).save(folder / name, overwrite=True)
    assert i2l("check", folder) == 1
    told = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in told[:4]] == [
        str(folder / name) for name in ("a.safetensors", "c.safetensors", "q.safetensors", "sub/d.safetensors")
    ]
    assert "all: Forge Neo" in told[0] and "Test LoRA" in told[1] and "Forge Neo" not in told[1]
    assert told[4] == "4 of 5 LoRAs done, 1 failed"
    assert any(line.split() == ["diffusers", "loads", "2", "of", "them", "whole"] for line in told[5:])
    assert i2l("check", folder, "--json") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["consumers" in line for line in lines] == [True, False, True, True, True]


def test_nothing_is_overwritten_unasked(folder, capsys):
    out = folder.parent / "out"
    out.mkdir()
    (out / "c.safetensors").write_text("mine")
    assert i2l("convert", folder, "-o", out) == 1
    assert (out / "c.safetensors").read_text() == "mine"
    assert "c.safetensors: exists already" in capsys.readouterr().err
    assert written(out) == ["a.safetensors", "c.safetensors", "sub/d.safetensors"]


def test_in_place_when_told(folder):
    before = written(folder)
    assert i2l("convert", folder, "--to", "kohya", "-o", folder, "--overwrite") == 1
    assert written(folder) == before
    assert Lora.read(folder / "sub" / "d.safetensors").read_from.reading.key_format == "kohya"


def test_the_folder_of_an_adapter_is_one_lora(folder):
    style(folder / "peft" / "adapter_model.safetensors")
    (folder / "peft" / "adapter_config.json").write_text("{}")
    assert not is_for_folder(ConvertRequest(folder / "peft"))
    i2l("convert", folder, "-o", folder.parent / "out")
    assert "peft.safetensors" in written(folder.parent / "out")


def test_two_loras_of_one_name_do_not_replace_each_other(folder, capsys):
    style(folder / "a" / "adapter_model.safetensors")
    i2l("convert", folder, "-o", folder.parent / "out", "--overwrite")
    assert "was just written from another file" in capsys.readouterr().err
    assert len(Lora.read(folder.parent / "out" / "a.safetensors")) == 4


def test_what_fails_for_all_is_told_once(folder, tmp_path):
    with pytest.raises(UserError, match="Say with -o into which folder"):
        i2l("convert", folder)
    with pytest.raises(UserError, match="is a file"):
        i2l("convert", folder, "-o", folder / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="safetensors file is in this folder"):
        i2l("check", tmp_path / "empty")
    assert not is_for_folder(InspectRequest(folder)) and not is_for_folder(ExportRequest(folder, "diffusers"))


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.safetensors").write_bytes(b"no LoRA")
    assert i2l("convert", tmp_path / "in", "-o", tmp_path / "new" / "out") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_stop_ends_it_between_files(folder):
    class Stop(Reporter):
        stop = False

        def cancelled(self):
            return self.stop

    out, reporter = folder.parent / "out", Stop()
    outcomes = for_each_file(ConvertRequest(folder, output=out), Context(reporter=reporter))
    assert next(outcomes).result.file == out / "a.safetensors"
    reporter.stop = True
    with pytest.raises(Cancelled):
        next(outcomes)
    assert written(out) == ["a.safetensors"]


def test_links_that_lead_in_circles_end(folder):
    (folder / "sub" / "up").symlink_to(folder, target_is_directory=True)
    outcomes = list(for_each_file(ConvertRequest(folder, output=folder.parent / "out"), Context()))
    assert len(outcomes) == 4 and torch.equal(*[Lora.read(folder.parent / "out" / name)[next(iter(MINI.i2l_modules))][0]
                                                for name in ("a.safetensors", "sub/d.safetensors")])  # fmt: skip
