"""Several styles at once in the tab: what is made, what is skipped, and what a stop leaves."""

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
