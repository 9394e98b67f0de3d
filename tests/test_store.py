"""Where weights are found, how a file is recognised, and what is said when there are none."""

import json
import os
import shutil
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import WritePlan, write
from i2l_ext.models import catalogue, store
from i2l_ext.models.catalogue import MODELS, Checkpoint
from i2l_ext.models.listing import listing
from i2l_ext.models.store import Folders, files_identity, locate, require
from i2l_ext.weights.structure import structure_md5

SHAPES = {"head.weight": (4, 6), "head.bias": (4,), "tail.weight": (2, 4)}
PARTS = {part.id: part for model in MODELS.values() for part in model.parts}


def save(path: Path, shapes=SHAPES, fill=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    plans = [
        WritePlan(key, "BF16", shape, partial(lambda n: [bytes([fill]) * 2 * n], prod(shape)))
        for key, shape in shapes.items()
    ]
    with path.open("wb") as stream:
        write(stream, plans)
    return path


def save_shards(folder: Path, index: str = "model.safetensors.index.json") -> list[Path]:
    halves = {"model-00001-of-00002.safetensors": ["head.weight"], "model-00002-of-00002.safetensors": []}
    halves["model-00002-of-00002.safetensors"] = [key for key in SHAPES if key != "head.weight"]
    paths = [save(folder / name, {key: SHAPES[key] for key in keys}) for name, keys in halves.items()]
    weight_map = {key: name for name, keys in halves.items() for key in keys}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


def checkpoint(files=("sub/model.safetensors",), repo="Some/Repo-1.0", **more) -> Checkpoint:
    spec = SimpleNamespace(shapes=SHAPES)
    return Checkpoint("tiny", "heads", spec, repo, files, 36, structure_md5(SHAPES), **more)


@pytest.fixture
def folders(tmp_path):
    made = Folders(tmp_path / "own", (tmp_path / "webui",), (tmp_path / "other",), tmp_path / "ms", tmp_path / "hf")
    for folder in (made.own, *made.webui):
        folder.mkdir()
    return made


TINY = checkpoint()
SHARDED = checkpoint(("text/model.safetensors.index.json",))
SNAPSHOTS = "models--Some--Repo-1.0/snapshots"


@pytest.mark.parametrize(
    "place",
    [
        "own/Some/Repo-1.0/sub",
        "webui/Some/Repo-1.0/sub",
        "other/Some/Repo-1.0/sub",
        f"hf/{SNAPSHOTS}/abc/sub",
        "ms/Some/Repo-1.0/sub",
        "ms/hub/models/Some/Repo-1___0/sub",
        "ms/models/Some/Repo-1___0/sub",
        "ms/models/Some--Repo-1.0/snapshots/master/sub",
    ],
)
def test_found_by_name_in_every_place(tmp_path, folders, place):
    assert locate(TINY, folders) is None
    path = save(tmp_path / place / "model.safetensors")
    assert locate(TINY, folders) == [path]


def test_own_folder_comes_first(tmp_path, folders):
    save(tmp_path / "other/Some/Repo-1.0/sub/model.safetensors")
    own = save(tmp_path / "own/Some/Repo-1.0/sub/model.safetensors")
    assert locate(TINY, folders) == [own]


def test_hub_cache_follows_the_main_revision(tmp_path, folders):
    main = save(tmp_path / "hf" / SNAPSHOTS / ("a" * 40) / "sub/model.safetensors")
    os.utime(main.parents[1], (1, 1))
    newer = save(tmp_path / "hf" / SNAPSHOTS / ("b" * 40) / "sub/model.safetensors")
    assert locate(TINY, folders) == [newer]
    refs = tmp_path / "hf/models--Some--Repo-1.0/refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    assert locate(TINY, folders) == [main]


def test_a_renamed_file_is_recognised_by_its_tensors(tmp_path, folders):
    save(tmp_path / "own/a.safetensors", {**SHAPES, "more": (1,)})
    (tmp_path / "own/b.safetensors").write_bytes(b"\0" * 72)
    path = save(tmp_path / "webui/deep/er/my weights.safetensors")
    assert locate(TINY, folders) == [path]
    assert locate(replace(TINY, structure_md5=None), folders) is None


def test_of_two_checkpoints_of_one_structure_each_finds_its_own(tmp_path, folders):
    """Z-Image-i2L and Z-Image-Omni-Base-i2L have the same tensors, and the same name in their repositories."""
    other = replace(TINY, id="omni", repo="Some/Repo-Omni-1.0", renamed="omni")
    plain = replace(TINY, renamed=r"\A(?!.*omni)")
    theirs = save(tmp_path / "webui/Some/Repo-Omni-1.0/sub/model.safetensors")
    assert (locate(plain, folders), locate(other, folders)) == (None, [theirs])
    renamed = save(tmp_path / "webui/more/it.safetensors")
    assert (locate(plain, replace(folders)), locate(other, replace(folders))) == ([renamed], [theirs])
    store.note_path(renamed).write_text(json.dumps({"repo": "Some/Other"}))
    assert locate(plain, replace(folders)) is None


def test_other_folders_are_not_scanned(tmp_path, folders):
    save(tmp_path / "other/renamed.safetensors")
    assert locate(TINY, folders) is None


def test_a_file_of_another_size_is_not_even_opened(tmp_path, folders, monkeypatch):
    save(tmp_path / "webui/checkpoint.safetensors", {"x": (5,)})
    monkeypatch.setattr(store, "HEADER_SLACK", 1)
    monkeypatch.setattr(store, "_structure", lambda paths: pytest.fail("opened"))
    assert locate(TINY, folders) is None


def test_shards(tmp_path, folders):
    paths = save_shards(tmp_path / "own/Some/Repo-1.0/text")
    assert locate(SHARDED, folders) == paths
    paths[1].unlink()
    assert locate(SHARDED, folders) is None
    renamed = save_shards(tmp_path / "webui/elsewhere", "other.safetensors.index.json")
    assert locate(SHARDED, replace(folders)) == renamed


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000]
    + [
        json.dumps({"weight_map": {"a": name}})
        for name in (
            "../x.safetensors",
            "a/x.safetensors",
            "C:x.safetensors",
            "\\x.safetensors",
            "x.bin",
            ".safetensors",
        )
    ],
)
def test_a_bad_list_of_shards_is_refused(tmp_path, folders, text):
    index = tmp_path / "own/Some/Repo-1.0/text/model.safetensors.index.json"
    index.parent.mkdir(parents=True)
    index.write_text(text)
    with pytest.raises(UserError, match="not a usable list of shards"):
        locate(SHARDED, folders)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors.sha256"])
def test_other_json_is_read_within_the_bounds_of_a_header(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"weight_map": {"a": [' + "[]," * 3_000_000 + "[]]}}")
    tracemalloc.start()
    try:
        with suppress(UserError):
            store.shards(path)
        assert store.read_note(path.with_suffix("")) == {}
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_what_is_wrong_with_a_file_is_named(folders):
    path = save(folders.own / "Some/Repo-1.0/sub/model.safetensors", {**SHAPES, "tail.weight": (4, 2)})
    with pytest.raises(UserError, match=r"'tail.weight' has the shape \[4, 2\] and not \[2, 4\]"):
        locate(TINY, folders)
    save(path, {key: shape for key, shape in SHAPES.items() if key != "head.bias"})
    with pytest.raises(UserError, match=r"'head.bias' is missing"):
        locate(TINY, folders)
    path.write_bytes(save(path).read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        locate(TINY, folders)


def test_a_damaged_file_does_not_hide_a_good_one(tmp_path, folders):
    save(folders.own / "Some/Repo-1.0/sub/model.safetensors").write_bytes(b"no")
    good = save(tmp_path / "other/Some/Repo-1.0/sub/model.safetensors")
    assert locate(TINY, folders) == [good]


def test_shipped_weights_lie_in_the_package(tmp_path, folders, monkeypatch):
    shipped = checkpoint(("mini/weights/tiny.safetensors",), repo=None)
    monkeypatch.setattr(store, "PACKAGE", tmp_path / "package")
    assert locate(shipped, folders) is None
    path = save(tmp_path / "package/mini/weights/tiny.safetensors")
    assert locate(shipped, folders) == [path]


def test_folders_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("I2L_MODELS", f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "ds"))
    made = Folders.default()
    assert made.own == tmp_path / "a" and made.webui[0] == tmp_path / "b"
    assert made.modelscope == tmp_path / "ms" and made.others == (tmp_path / "ds",)
    monkeypatch.delenv("I2L_MODELS")
    assert Folders.default().own.parts[-2:] == ("i2l", "models")


def test_a_checkout_among_extensions_sees_the_webui(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PACKAGE", tmp_path / "webui/extensions/image-to-lora/i2l_ext")
    monkeypatch.delenv("I2L_MODELS", raising=False)
    (tmp_path / "webui/models").mkdir(parents=True)
    assert Folders.default().webui == (tmp_path / "webui/models/i2l", tmp_path / "webui/models")
    assert Folders.default().own == tmp_path / "webui/models/i2l", "as the tab has it"


def test_where_downloads_went_is_remembered(tmp_path, monkeypatch):
    """The tab's downloads are found by a command line that knows nothing of its settings, and the other way round."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("I2L_MODELS", str(tmp_path / "tab"))
    store.remember(Folders.default().own)
    store.remember(Folders.default().own)
    monkeypatch.delenv("I2L_MODELS")
    assert Folders.default().own == tmp_path / "user/i2l/models"
    path = save(tmp_path / "tab/Some/Repo-1.0/sub/model.safetensors")
    assert locate(TINY) == [path] and Folders.default().others[1:] == (tmp_path / "tab",)
    path.rename(path.with_name("renamed.safetensors"))
    assert locate(TINY) is None, "it may be any folder, so it is not looked through"
    renamed = save(tmp_path / "user/i2l/models/renamed.safetensors")
    monkeypatch.setenv("I2L_MODELS", str(tmp_path / "else where"))
    assert locate(TINY) == [renamed], "the user's own folder is, whatever the environment says"
    store.remember(tmp_path / "user/i2l/models")
    assert len(json.loads((tmp_path / "user/i2l/folders.json").read_bytes())) == 1


def test_require_says_what_to_do_in_one_line(folders):
    model = MODELS["qwen-image-style"]
    with pytest.raises(UserError) as caught:
        require(model, folders)
    line = str(caught.value)
    assert "\n" not in line
    for word in ("siglip2-g384 (2.3 GB)", "20.6 GB in all", "i2l models download qwen-image-style", "--model mini"):
        assert word in line


def test_require_gives_every_part(folders, monkeypatch):
    model = replace(MODELS["qwen-image-style"], siglip2=TINY, dinov3=SHARDED, experts=())
    one = save(folders.own / "Some/Repo-1.0/sub/model.safetensors")
    shards = save_shards(folders.own / "Some/Repo-1.0/text")
    model = replace(model, dinov3=replace(SHARDED, id="sharded"))
    assert require(model, folders) == {"tiny": [one], "sharded": shards}


def test_identity_changes_with_the_weights_and_not_with_the_place(tmp_path):
    path = save(tmp_path / "a.safetensors")
    first = files_identity([path])
    moved = tmp_path / "b.safetensors"
    shutil.copy2(path, moved)
    assert files_identity([moved]) == first
    save(path, fill=1)
    os.utime(path, ns=(1, 1))
    assert files_identity([path]) != first


def test_identity_by_the_known_sha256(tmp_path):
    path = save(tmp_path / "a.safetensors")
    plain = files_identity([path])
    status = path.stat()
    noted = {"sha256": "ab" * 32, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    store.note_path(path).write_text(json.dumps(noted))
    known = files_identity([path])
    assert known != plain
    os.utime(path, ns=(1, 1))  # the file is not the one that was verified any more
    assert files_identity([path]) not in (plain, known)
    store.note_path(path).write_text("no json")
    assert store.known_sha256(path) is None


@pytest.mark.parametrize("part", PARTS.values(), ids=lambda part: part.id)
def test_our_modules_have_the_published_structure(part):
    """Hash and size of every checkpoint, from our own module definitions, against the published ones."""
    if part.kind in ("bias", "template"):
        with pytest.raises(ValueError, match="not known"):
            part.shapes  # noqa: B018
        return
    assert sum(map(prod, part.shapes.values())) == part.parameters
    if part.repo:
        assert structure_md5(part.shapes) == part.structure_md5


@pytest.mark.parametrize("name", MODELS)
def test_what_is_fetched_by_hand_has_repository_and_file(name):
    for part in catalogue.MODELS[name].parts:
        assert part.repo is None or all(place.startswith(f"{part.repo}/") for place in part.places)
    if name == "z-image-v2":
        assert part.places == ["DiffSynth-Studio/ZImage-i2L-v2/*"]


def test_shards_are_fetched_with_their_index():
    [place] = catalogue.QWEN_VL.places
    assert place == "Qwen/Qwen-Image/text_encoder/model.safetensors.index.json and the files that it lists"


def test_the_miniatures_are_listed_last(folders):
    mini = [row.arch == "mini" for row in listing(folders)]
    assert mini == sorted(mini) and set(mini) == {True, False}


def test_listing(folders, monkeypatch):
    monkeypatch.setattr(
        catalogue, "MODELS", {"m": replace(MODELS["qwen-image-style"], name="m", siglip2=TINY, dinov3=TINY)}
    )
    rows = listing(folders)
    assert not rows[0].ready and rows[0].parts[0].structure_md5 is None
    path = save(folders.own / "Some/Repo-1.0/sub/model.safetensors")
    row = json.loads(json.dumps(listing(folders, structures=True)[0].json()))
    style = catalogue.STYLE
    assert row["name"] == "m" and row["arch"] == "qwen-image" and row["download_bytes"] == style.nbytes
    assert row["parts"][0]["path"] == str(path) and row["parts"][0]["bytes"] == path.stat().st_size
    assert row["parts"][2]["structure_md5"] == style.structure_md5 and not row["parts"][2]["present"]
    path.write_bytes(b"")
    assert "empty" in listing(folders)[0].parts[0].problem
