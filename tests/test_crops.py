"""Which square of a picture is taken: its text, its pixels, what a LoRA remembers of it, and the tray's cards."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from i2l_ext import images
from i2l_ext.commands.main import main
from i2l_ext.converters.errors import UserError
from i2l_ext.operations import Context, perform
from i2l_ext.requests import BatchRequest, MakeRequest, PreviewRequest, Square, parse_crop
from i2l_ext.service.batches import make_groups
from i2l_ext.service.service import Service, tray_pictures
from i2l_ext.service.uploads import split_crops
from i2l_ext.webui import actions, html
from i2l_ext.webui.hosts.standalone import StandaloneHost
from test_queue import SMALL

NO_CROPS = (
    "",
    "1,2",
    "1,2,0",
    "-1,0,9",
    "1,2,3,4",
    "1.5,0,9",
    "a,b,c",
    "center",
    "1, 2, 3",
    "١,٢,٣",
    "01,0,9",
    "1,2,3\n",
    "9" * 30,
)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def file_of(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def same(one, other):
    return all(np.array_equal(np.asarray(one.view(size)), np.asarray(other.view(size))) for size in (1024, 224))


@pytest.fixture
def wide(tmp_path):
    path = tmp_path / "wide.png"
    noise(150, 60).save(path)
    return path


def test_a_text_is_a_square_or_one_line_says_how():
    assert parse_crop("centre") is None and parse_crop("0,20,300") == Square(0, 20, 300)
    assert str(Square(0, 20, 300)) == "0,20,300"
    for text in NO_CROPS:
        with pytest.raises(UserError, match="LEFT,TOP,SIDE") as caught:
            parse_crop(text)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError):
            MakeRequest((Path("/a.png"),), crops=(text,)).validate()


def test_a_square_is_as_if_the_picture_had_been_cropped_before():
    whole = noise(150, 90)
    left, top, side = 40, 7, 61
    before = images.open_image(file_of(whole.crop((left, top, left + side, top + side))))
    square = images.open_image(file_of(whole), crop=Square(left, top, side))
    assert same(square, before) and square.crop == (left, top, side)
    assert square.sha256 == images.open_image(file_of(whole)).sha256
    assert not same(square, images.open_image(file_of(whole)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_of_the_upright_picture(orientation):
    shown = noise(50, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    stored = shown.transpose(images._TURNS[undo]) if orientation > 1 else shown
    data = file_of(stored, exif=exif)
    assert np.array_equal(np.asarray(images.open_whole(data).image), np.asarray(shown))
    assert same(
        images.open_image(data, crop=Square(20, 0, 30)), images.open_image(file_of(shown.crop((20, 0, 50, 30))))
    )


@pytest.mark.parametrize("crop", [Square(91, 0, 60), Square(0, 1, 60), Square(0, 0, 61), Square(10**8, 0, 1)])
def test_a_square_beyond_the_picture_is_refused(wide, crop):
    assert images.open_image(wide, crop=Square(90, 0, 60))
    with pytest.raises(UserError, match=rf"^wide\.png: the square {crop} does not lie inside .* 150 x 60") as caught:
        images.open_image(wide, crop=crop)
    assert "\n" not in str(caught.value)


def made(capsys, *words):
    capsys.readouterr()
    code = main(["make", *map(str, words), "--precision", "fp32", "--json"])
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else (code, err)


def metadata_of(made):
    from i2l_ext.converters.files import TensorFile

    with TensorFile(Path(made["file"])) as file:
        return file.header.metadata


def test_two_squares_of_a_wide_picture_and_the_same_again(world, wide, tmp_path, capsys):
    rest = ("--lora-dir", tmp_path / "Lora")
    squares = ("--model", "small", "--weights", 1, 3, "--crops", "0,0,60", "90,0,60")
    first = made(capsys, wide, wide, *squares, *rest, "--name", "a")
    parts = []
    for name, left in (("left", 0), ("right", 90)):
        parts.append(tmp_path / f"{name}.png")
        Image.open(wide).crop((left, 0, left + 60, 60)).save(parts[-1])
    apart = made(capsys, *parts, "--model", "small", "--weights", 1, 3, *rest, "--name", "b")
    ours, theirs = load_file(first["file"]), load_file(apart["file"])
    assert all((ours[key] == theirs[key]).all() for key in theirs) and ours.keys() == theirs.keys()
    assert [(one["crop"], one["weight"]) for one in first["images"]] == [("0,0,60", 0.25), ("90,0,60", 0.75)]
    assert len({one["sha256"] for one in first["images"]}) == 1
    assert json.loads(metadata_of(first)["i2l.images"]) == first["images"]
    again = made(capsys, wide, "--like", first["file"], *rest, "--name", "c")
    assert metadata_of(again)["i2l.request"] == metadata_of(first)["i2l.request"]
    other = made(capsys, wide, "--like", first["file"], "--crops", "45,0,60", *rest, "--name", "d")
    assert [one["crop"] for one in other["images"]] == ["45,0,60"]
    assert metadata_of(other)["i2l.request"] != metadata_of(first)["i2l.request"]


def test_the_centre_is_what_it_was(world, wide, tmp_path, capsys):
    """Without a square nothing of the file differs from one that was made before there were any."""
    plain = made(capsys, wide, "--model", "small", "--lora-dir", tmp_path, "--name", "a")
    named = made(capsys, wide, "--model", "small", "--lora-dir", tmp_path, "--name", "b", "--crops", "centre")
    assert plain["images"] == named["images"] and "crop" not in plain["images"][0]
    assert metadata_of(plain)["i2l.request"] == metadata_of(named)["i2l.request"]


def test_another_square_is_encoded_anew(world, wide, tmp_path, capsys):
    entries = []
    for crop in ("0,0,60", "0,0,60", "90,0,60", "centre"):
        made(capsys, wide, "--model", "small", "--lora-dir", tmp_path, "--name", "a", "--overwrite", "--crops", crop)
        entries.append(len(list((tmp_path / "cache" / "embeddings").iterdir())))
    assert entries[0] == entries[1] and entries[2] == 2 * entries[0] and entries[3] == 3 * entries[0]


def test_refusals_of_the_command_line(world, wide, tmp_path, capsys):
    rest = ("--model", "small", "--lora-dir", tmp_path, "--name", "a")
    code, told = made(capsys, wide, *rest, "--crops", "0,0,60", "90,0,60")
    assert code == 1 and "2 crops for 1 pictures: give one square for each picture" in told
    code, told = made(capsys, wide, *rest, "--crops", "0,0,600")
    assert code == 1 and "does not lie inside" in told and len(told.splitlines()) == 1
    code, told = made(capsys, wide, "--model", "small", "--lora-dir", tmp_path, "--each", "--crops", "0,0,60")
    assert code == 1 and "leave out --crops" in told
    with pytest.raises(SystemExit) as ended:
        main(["make", str(wide), "--crops", "here"])
    assert ended.value.code == 2 and "LEFT,TOP,SIDE" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.safetensors"))


def test_looks(wide, tmp_path):
    paths = (wide, wide, wide)
    seen = perform(PreviewRequest(paths, crops=("centre", "0,0,60", "0,0,61")), Context()).json()
    assert seen[0]["picture"] != seen[1]["picture"] and (seen[0]["width"], seen[0]["height"]) == (150, 60)
    assert set(seen[2]) == {"error"} and seen[2]["error"].startswith("picture 3: ")
    [whole] = perform(PreviewRequest((wide,), whole=True), Context()).json()
    assert (whole["width"], whole["height"]) == (150, 60) and whole["picture"].startswith("data:image/jpeg")
    for wrong in ({"crops": ("centre",)}, {"numbers": (1,)}, {"crops": ("x",) * 3}):
        with pytest.raises(UserError):
            PreviewRequest(paths, **wrong).validate()


# --- the tab ------------------------------------------------------------------------------------------------------


@pytest.fixture
def service(world, tmp_path, monkeypatch):
    monkeypatch.setenv("I2L_TEST_SMALL", "1")
    (tmp_path / "Lora").mkdir()
    host = StandaloneHost(tmp_path / "state", lora_folder=tmp_path / "Lora", is_local=True, serves_api=False)
    service = Service(host, tmp_path / "state", SMALL)
    yield service
    service.queue.close()


def test_ids_of_a_tray():
    one, other = "a" * 64, "b" * 64
    assert split_crops([one, other]) == ([one, other], None)
    assert split_crops([f"{one}@0,0,9", other]) == ([one, other], ("0,0,9", "centre"))


def test_cards_and_the_dialog(service, wide):
    id = service.uploads.take(wide)
    cards = service.preview([id, f"{id}@0,0,60", f"{id}@90,0,60"])
    assert len({one["picture"] for one in cards}) == 3 and all(one["width"] == 150 for one in cards)
    looks = [job for job in service.queue.jobs() if job.kind == "look"]
    assert service.preview([f"{id}@90,0,60", id]) == [cards[2], cards[0]]
    shown = html.tray([{**one, "weight": 1.0} for one in cards])
    assert shown.count(f'data-i2l-id="{id}') == 3 and f"{id}@90,0,60" in shown
    told = actions.act(service, json.dumps({"action": "crop", "id": f"{id}@0,0,60"}))
    assert told["make_error"] == "" and 'data-i2l-width="150" data-i2l-height="60"' in told["crop"]
    assert f'data-i2l-upload="{id}"' in told["crop"] and "data:image/jpeg" in told["crop"]
    again = actions.act(service, json.dumps({"action": "crop", "id": id}))
    assert again["crop"] != told["crop"], "a page shows it again, so it has to differ"
    assert len([job for job in service.queue.jobs() if job.kind == "look"]) == len(looks) + 1, "all of it is kept"
    for wrong in (None, 7, "", "../../etc/passwd", "c" * 64, f"{id}/x@0,0,1"):
        refused = actions.act(service, json.dumps({"action": "crop", "id": wrong}))
        assert "i2l-error" in refused["make_error"] and "crop" not in refused


def test_a_tray_that_a_browser_made_up(service, wide):
    id = service.uploads.take(wide)
    for crop in ("x", "<b>", "../..", "-1,0,5", "1,2,3@4,5,6"):
        with pytest.raises(UserError):
            service.preview([f"{id}@{crop}"])
    assert "does not lie inside" in service.preview([f"{id}@0,0,99"])[0]["error"]
    assert not list(service.uploads.folder.glob("*x*")) and not list(service.uploads.folder.glob("*99*"))


def test_squares_of_the_tray_become_a_lora_and_its_like(service, wide):
    id = service.uploads.take(wide)
    ids, weights = tray_pictures({"pictures": [[f"{id}@0,0,60", 1], [f"{id}@90,0,60", 3], [id, 4]]})
    pictures, crops = split_crops(ids)
    job = service.make(pictures, name="it", model="small", weights=tuple(weights), crops=crops)
    service.queue.wait(job.id, 120)
    assert job.state == "done", job.error
    assert [one.get("crop") for one in job.result["images"]] == ["0,0,60", "90,0,60", None]
    with pytest.raises(UserError, match="one square for each"):
        service.make(pictures, name="it", model="small", crops=("0,0,60",))
    while service.library.rows() is None:
        pass
    [anew] = service.library.make_anew(["it.safetensors"])
    service.queue.wait(anew.id, 120)
    assert anew.state == "done" and anew.result["images"] == job.result["images"]
    [variant] = service.make_variants(job.id, [0.5], [], [])
    service.queue.wait(variant.id, 120)
    assert variant.result["images"] == job.result["images"]


def test_each_square_of_the_tray(service, wide):
    id = service.uploads.take(wide)
    [path] = service.uploads.paths([id])
    job = make_groups(service, [("a", [f"{id}@0,0,60"]), ("b", [id])], model="small")
    service.queue.wait(job.id, 120)
    assert job.state == "done", job.error
    assert [[one.get("crop") for one in made["images"]] for made in job.result["made"]] == [["0,0,60"], [None]]
    with pytest.raises(UserError, match="--each takes the centre"):
        replace(BatchRequest((path,)), crops=("centre",)).validate()
