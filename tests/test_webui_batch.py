"""Several styles at once in the tab: what is made, what is skipped, and what a stop leaves."""

import re
import shutil
import time

import pytest

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.job import ENDED
from i2l_ext.requests import BatchRequest
from i2l_ext.service.batches import make_each_of_folder, make_groups
from i2l_ext.service.service import Service
from i2l_ext.webui import batch_pane
from i2l_ext.webui.hosts.standalone import StandaloneHost
from test_queue import SMALL, until


@pytest.fixture
def service(world, tmp_path, monkeypatch):
    monkeypatch.setenv("I2L_TEST_SMALL", "1")
    folder = tmp_path / "Lora"
    folder.mkdir()
    host = StandaloneHost(tmp_path / "state", lora_folder=folder, is_local=True, serves_api=False)
    service = Service(host, tmp_path / "state", SMALL)
    service.folder = folder
    yield service
    service.queue.close()


def loras(service):
    return sorted(path.stem for path in service.folder.rglob("*.safetensors"))


def test_each_picture_of_the_tray(service, world):
    (service.folder / "style-1.safetensors").write_bytes(b"of somebody else")
    ids = [service.uploads.take(path) for path in world.pictures[:2]]
    groups = [("style-1", ids[:1]), ("style-2", ids[1:])]
    job = service.queue.wait(make_groups(service, groups, model="small").id, 300)
    assert job.state == "done", job.error
    assert [one["name"] for one in job.result["made"]] == ["style-1-2", "style-2"] and job.result["asked"] == 2
    assert loras(service) == ["style-1", "style-1-2", "style-2"]
    shown = batch_pane.show_batch(job)
    assert "2 / 2" in shown and shown.count("data:image/jpeg") == 2 and str(service.folder) not in shown


def test_a_folder_and_again(service, world, tmp_path):
    styles = tmp_path / "styles"
    (styles / "pair").mkdir(parents=True)
    for picture, name in zip(world.pictures, ("a.png", "pair/b.png", "pair/c.png"), strict=True):
        shutil.copy(picture, styles / name)
    (styles / "broken.png").write_text("no picture")
    job = service.queue.wait(make_each_of_folder(service, styles, model="small").id, 300)
    assert job.state == "done" and loras(service) == ["a", "pair"]
    assert [one["name"] for one in job.result["skipped"]] == ["broken"] and job.result["asked"] == 3
    again = service.queue.wait(make_each_of_folder(service, styles, model="small").id, 300)
    assert {one["name"]: one["done"] for one in again.result["skipped"]} == {"a": True, "pair": True, "broken": False}
    assert "made before" in batch_pane.show_batch(again)


def test_who_stops_it_keeps_what_was_made_and_is_told(service, world, tmp_path):
    styles = tmp_path / "styles"
    styles.mkdir()
    for number in range(34):
        shutil.copy(world.pictures[0], styles / f"{number:02}.png")
    job = make_each_of_folder(service, styles, model="small")
    until(lambda: len(loras(service)) > 1 or job.state in ENDED, 300)
    start = time.monotonic()
    service.queue.cancel(job.id)
    service.queue.wait(job.id, 30)
    assert job.state == "done" and time.monotonic() - start < 20
    assert loras(service) == sorted(one["name"] for one in job.result["made"]) and len(job.result["made"]) < 34
    assert f"{len(job.result['made'])} / 34" in batch_pane.show_batch(job)


def test_what_is_refused(service, tmp_path):
    with pytest.raises(UserError, match="no picture yet"):
        make_groups(service, [("a", [])])
    for folder, local in (("", True), ("relative", True), (str(tmp_path / "nowhere"), True), (str(tmp_path), False)):
        with pytest.raises(UserError, match="older"):
            batch_pane.checked_folder(folder, local)
    with pytest.raises(UserError, match="names"):
        BatchRequest((tmp_path,), names=("a", "b")).validate()


def test_groups_of_the_page(service, world, tmp_path, monkeypatch):
    """What is dropped goes into a group of its own, or into one that is there; what is no picture is told."""
    monkeypatch.setattr(batch_pane, "upload_folders", lambda: [tmp_path])
    for name, picture in zip(("Oil paint.png", "ink.png"), world.pictures, strict=False):
        shutil.copy(picture, tmp_path / name)
    (tmp_path / "text.png").write_text("no picture")
    oil, ink, text, elsewhere = (str(tmp_path / name) for name in ("Oil paint.png", "ink.png", "text.png", "../x.png"))
    first = batch_pane.take_group(service, {"turn": 1, "group": 0, "paths": [oil]}, {"groups": []})
    [id] = re.findall(r'data-i2l-id="([0-9a-f]{64})"', first)
    assert 'value="Oil-paint"' in first and 'data-i2l-turn="1"' in first and 'data-i2l-drop="group 1"' in first
    form = {"groups": [{"name": "mine <b>", "pictures": [id]}]}
    more = batch_pane.take_group(service, {"group": 1, "paths": [oil, ink, text]}, form)
    assert len(re.findall("data-i2l-id", more)) == 2 and more.count("i2l-group") == 1, "the same picture is there once"
    assert "mine &lt;b&gt;" in more and more.count("i2l-error") >= 2
    again = batch_pane.take_group(service, {"group": 9, "paths": [elsewhere]}, form)
    assert "not a file which this page uploaded" in again and "mine &lt;b&gt;" in again
    named = {"groups": [{"name": "ink", "pictures": [id]}]}
    assert 'value="ink-2"' in batch_pane.take_group(service, {"group": 0, "paths": [ink]}, named)
    for groups in ("x", [1], [{"pictures": [id]}], [{"name": "a"}], [{"name": "a", "pictures": [1]}]):
        with pytest.raises(UserError, match="damaged"):
            batch_pane.read_groups({"groups": groups})
    assert "damaged" in batch_pane.take_group(service, {"turn": 3, "paths": []}, {"groups": [1]})
