"""The LoRA library: what lies in a folder, what lies beside a LoRA, and the trash."""

import json
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from attacks import shelf  # noqa: E402
from i2l_ext.commands.main import main  # noqa: E402
from i2l_ext.converters.errors import UserError  # noqa: E402
from i2l_ext.library import cards, metadata, trash  # noqa: E402
from i2l_ext.operations import Context, perform  # noqa: E402
from i2l_ext.requests import ConvertRequest, DiscardRequest, LibraryRequest, MakeRequest, MergeRequest  # noqa: E402


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("I2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return shelf.lay(tmp_path)


def listed(*folders):
    return perform(LibraryRequest(folders), Context())


def test_what_lies_there(folder):
    found = listed(folder)
    rows = {row["file"]: row for row in found.rows}
    assert set(rows) == {"old.safetensors", "style.safetensors", "styles/other.safetensors", "half.safetensors"}
    old = rows["old.safetensors"]
    assert (old["arch"], old["key_format"], old["rank"], old["modules"]) == ("mini", "webui", "4", 4)
    assert old["preview"] == str(folder / "old.preview.png") and old["made"] is None
    assert old["loads"] == {}, "no program has the miniature"
    assert "half.safetensors" in rows["half.safetensors"]["error"] and "loads" not in rows["half.safetensors"]


def test_the_command_says_of_a_test_lora_what_check_says(folder, capsys):
    assert main(["library", str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "3 LoRAs, 1 other file; 4 headers read, the others remembered"
    lines = {line.partition(":")[0]: line for line in out}
    assert lines["old.safetensors"].endswith("; Test LoRA: only `i2l draw` can use it.")


def test_headers_are_read_once(folder):
    assert (listed(folder).read, listed(folder).read) == (4, 0)
    file = folder / "old.safetensors"
    shelf.lora(file, seed=7, modules=5)
    again = listed(folder)
    assert again.read == 1 and {row["file"]: row.get("modules") for row in again.rows}["old.safetensors"] == 5
    file.unlink()
    assert listed(folder).read == 0
    [kept] = (folder.parent / "cache" / "library").iterdir()
    assert "old.safetensors" not in json.loads(kept.read_text())["files"]


@pytest.mark.parametrize(
    "harm", ["", "[]", '{"files": 3}', '{"code": 1, "files": {}}', '{"files": {"old.safetensors": 1}}']
)
def test_a_damaged_memory_is_forgotten(folder, harm):
    listed(folder)
    [kept] = (folder.parent / "cache" / "library").iterdir()
    kept.write_text(harm)
    assert listed(folder).read == 4


def test_files_of_one_kind_are_judged_once_and_their_alphas_count(folder, monkeypatch):
    from i2l_ext.converters import consumers

    calls, check = [], consumers.check
    monkeypatch.setattr(consumers, "check", lambda path: calls.append(path.name) or check(path))
    for name, to in (("a", "webui"), ("b", "webui"), ("c", "kohya")):
        perform(ConvertRequest(folder / "old.safetensors", to, folder / f"{name}.safetensors"), Context())
    listed(folder)
    assert len([name for name in calls if name in ("a.safetensors", "b.safetensors", "old.safetensors")]) == 1
    assert "c.safetensors" in calls


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        listed(tmp_path / "nowhere")


def test_a_card_goes_along(folder):
    perform(ConvertRequest(folder / "old.safetensors", "kohya", folder / "new.safetensors"), Context())
    assert (folder / "new.preview.png").read_bytes() == (folder / "old.preview.png").read_bytes()
    assert (folder / "new.json").read_text() == (folder / "old.json").read_text()
    parts = (f"{folder / 'old.safetensors'}:0.2", f"{folder / 'style.safetensors'}:0.8")
    Image.new("RGB", (8, 8), "red").save(folder / "style.preview.png")
    perform(MergeRequest(parts, output=folder / "both.safetensors"), Context())
    assert (folder / "both.preview.png").read_bytes() == (folder / "style.preview.png").read_bytes()


def test_a_card_of_ones_own_stays_and_a_failure_leaves_none(folder):
    (folder / "new.json").write_text("{}")
    perform(ConvertRequest(folder / "old.safetensors", "kohya", folder / "new.safetensors"), Context())
    assert (folder / "new.json").read_text() == "{}" and (folder / "new.preview.png").exists()
    with pytest.raises(RuntimeError), cards.carried_over(folder / "old.safetensors", folder / "it.safetensors"):
        raise RuntimeError
    with pytest.raises(UserError, match="exists already"):
        perform(ConvertRequest(folder / "old.safetensors", "kohya", folder / "style.safetensors"), Context())
    assert not list(folder.glob("it.*"))


@pytest.mark.skipif(sys.platform != "linux", reason="the trash of freedesktop.org")
def test_into_the_trash_of_the_desktop(folder):
    done = perform(DiscardRequest((folder / "old.safetensors", folder / "styles" / "other.safetensors")), Context())
    assert done.files == ["old.safetensors", "other.safetensors"]
    home = folder.parent / "home" / "Trash"
    names = {path.name for path in (home / "files").iterdir()}
    assert names == {f"{stem}{end}" for stem in ("old", "other") for end in shelf.OURS}
    note = (home / "info" / "old.safetensors.trashinfo").read_text().splitlines()
    assert note[0] == "[Trash Info]" and note[1] == f"Path={folder / 'old.safetensors'}"
    time.strptime(note[2], "DeletionDate=%Y-%m-%dT%H:%M:%S")
    shelf.lora(folder / "old.safetensors")
    perform(DiscardRequest((folder / "old.safetensors",)), Context())
    assert (home / "files" / "old.2.safetensors").exists() and (folder / "style.safetensors").exists()


def test_without_a_desktop_they_lie_beside_where_no_host_lists_them(folder, monkeypatch):
    monkeypatch.setattr(trash, "_to_system", lambda file: (file / "nothing").stat())
    done = perform(DiscardRequest((folder / "old.safetensors",)), Context())
    assert done.folders == [folder / ".trash"]
    assert {path.name for path in (folder / ".trash").iterdir()} == {f"old{end}.trashed" for end in shelf.OURS}
    assert "old.safetensors" not in {row["file"] for row in listed(folder).rows}


def test_what_is_no_lora_is_not_discarded(folder):
    with pytest.raises(UserError, match="is no LoRA file"):
        perform(DiscardRequest((folder / "old.safetensors", folder / "notes.txt")), Context())
    assert (folder / "old.safetensors").exists()


def test_made_anew(world, tmp_path, capsys):
    """From its own metadata: model, strength, rank, and the weights of the same pictures."""
    words = ["make", *map(str, world.pictures[:2]), "--lora-dir", str(tmp_path), "--no-cache", "--json"]
    given = ["--model", "small", "--weights", "1", "3", "--strength", "0.5", "--rank", "2", "--to", "kohya"]
    assert main([*words, "--name", "a", *given]) == 0
    swapped = [words[0], words[2], words[1], *words[3:]]
    assert main([*swapped, "--name", "b", "--like", str(tmp_path / "a.safetensors")]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (second["rank"], second["key_format"], second["model"]) == (2, "kohya", "small")
    assert sorted(one["weight"] for one in second["images"]) == [0.25, 0.75]
    assert {one["sha256"]: one["weight"] for one in first["images"]} == {
        one["sha256"]: one["weight"] for one in second["images"]
    }
    assert (
        main([words[0], str(world.pictures[2]), *words[3:], "--name", "c", "--like", str(tmp_path / "a.safetensors")])
        == 1
    )
    assert "was not made of it" in capsys.readouterr().err
    rows = {row["file"]: row for row in listed(tmp_path).rows}
    assert rows["a.safetensors"]["made"]["options"] == {"key_format": "kohya", "rank": 2}


def test_a_lora_of_an_earlier_build_remembers_its_key_format():
    old = {"i2l.model": "mini", "i2l.strength": "1", "i2l.images": "[]", "i2l.options": '{"dialect": "kohya"}'}
    assert metadata.how_made(old)["options"] == {"key_format": "kohya"}


def test_a_lora_of_somebody_else_is_not_anew(folder, world):
    with pytest.raises(UserError, match="does not say how it was made"):
        perform(MakeRequest((world.pictures[0],), folder=folder, like=folder / "old.safetensors"), Context())
