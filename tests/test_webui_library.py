"""The library pane: what it lists, what its buttons do, and what comes of them."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from attacks import shelf  # noqa: E402
from i2l_ext.engine.job import ENDED  # noqa: E402
from i2l_ext.engine.queue import MAX_WAITING  # noqa: E402
from i2l_ext.service import library  # noqa: E402
from i2l_ext.service.service import Service  # noqa: E402
from i2l_ext.webui import actions  # noqa: E402
from i2l_ext.webui.hosts.standalone import StandaloneHost  # noqa: E402
from i2l_ext.webui.library_pane import library_news, show_library  # noqa: E402
from test_queue import SMALL, until  # noqa: E402


@pytest.fixture
def service(world, tmp_path, monkeypatch):
    monkeypatch.setenv("I2L_TEST_SMALL", "1")
    monkeypatch.setenv("I2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    folder = shelf.lay(tmp_path)
    host = StandaloneHost(tmp_path / "state", lora_folder=folder, is_local=True, serves_api=False)
    service = Service(host, tmp_path / "state", SMALL)
    service.folder = folder
    yield service
    service.queue.close()


def listed(service):
    until(lambda: service.library.rows() is not None and service.library.job.state in ENDED, 60)
    return {row["file"]: row for row in service.library.rows()}


def act(service, action, *files, **fields):
    told = {name: [value] for name, value in fields.items()} | {"file": list(files)}
    return actions.act(service, json.dumps({"action": action, "fields": told}))


def ended(service, *kinds):
    until(lambda: not service.queue.active(), 120)
    jobs = [job for job in service.queue.jobs() if job.kind in kinds]
    assert all(job.state == "done" for job in jobs), [job.error for job in jobs]
    return jobs


def test_the_list(service):
    seen = {}
    assert "i2l-quiet" in library_news(service, seen).get("library_list", "i2l-quiet")
    assert set(listed(service)) == {
        "old.safetensors",
        "style.safetensors",
        "styles/other.safetensors",
        "half.safetensors",
    }
    html = library_news(service, seen)["library_list"]
    assert html.count('name="file"') == 4 and html.count("data:image/jpeg") == 3
    assert str(service.folder) not in html, "no folder of this machine"
    assert library_news(service, seen) == {}


def test_filter_sort_and_pages(service, monkeypatch):
    listed(service)
    shown = act(service, "shelf", text="MINI oth", sort="name")["library_list"]
    assert "styles/other" in shown and "old.safetensors" not in shown
    monkeypatch.setattr(library, "PER_PAGE", 2)
    act(service, "shelf", sort="name")
    rows, count = service.library.shown()
    assert ([row["file"] for row in rows], count) == (["half.safetensors", "old.safetensors"], 4)
    actions.act(service, json.dumps({"action": "shelf", "page": 9, "fields": {"sort": ["name"]}}))
    assert [row["file"] for row in service.library.shown()[0]] == ["style.safetensors", "styles/other.safetensors"]
    act(service, "shelf", sort="wrong", arch="nothing")
    assert service.library.shown() == ([], 0) and "No LoRA here fits" in show_library(service)


def test_several_at_once(service):
    listed(service)
    assert act(service, "shelf_convert", "old.safetensors", "styles/other.safetensors", key_format="kohya") == {
        "library_error": ""
    }
    act(service, "shelf_resize", "style.safetensors", rank="8")
    act(service, "shelf_merge", "old.safetensors", "style.safetensors",
        **{"weight old.safetensors": "0.25", "weight style.safetensors": "-1"})  # fmt: skip
    jobs = ended(service, "convert", "rank", "merge")
    assert [job.title for job in jobs] == ["old-kohya", "other-kohya", "style-r8", "old-style-merged"]
    assert all(service.panes[job.id] == "library" for job in jobs)
    rows = listed(service)
    assert rows["old-kohya.safetensors"]["key_format"] == "kohya" and rows["style-r8.safetensors"]["rank"] == "8"
    assert all(rows[f"{job.title}.safetensors"]["preview"] for job in jobs), "a preview goes along"
    from i2l_ext.converters.inspection import inspect

    recipe = json.loads(inspect(service.folder / "old-style-merged.safetensors", values=False).metadata["i2l.merged"])
    assert [one["weight"] for one in recipe] == [0.25, -1.0]


def test_into_the_trash_and_the_list_knows(service):
    listed(service)
    act(service, "shelf_discard", "old.safetensors", "style.safetensors")
    ended(service, "discard")
    assert set(listed(service)) == {"styles/other.safetensors", "half.safetensors"}
    assert (service.folder / "notes.txt").exists() and not (service.folder / "old.json").exists()


def test_the_list_knows_before_the_host_is_told(service, monkeypatch):
    listed(service)
    told = []
    monkeypatch.setattr(service.queue, "_on_end", told.append)  # as if the host were slow to take it
    act(service, "shelf_discard", "old.safetensors")
    ended(service, "discard")
    assert "old.safetensors" not in listed(service)


def test_made_anew_with_its_weights(service, world):
    ids = [service.uploads.take(path) for path in world.pictures[:2]]
    service.make(ids, name="it", model="small", weights=(1.0, 3.0), strength=0.5, rank=2)
    ended(service, "make")
    until(lambda: "it.safetensors" in listed(service), 30)
    assert act(service, "shelf_anew", "it.safetensors") == {"library_error": ""}
    first, second = ended(service, "make")
    assert second.result["name"] == "it-2" and second.result["rank"] == 2
    assert second.result["images"] == first.result["images"]
    (service.uploads.folder / ids[0]).unlink()
    assert "no longer here" in act(service, "shelf_anew", "it.safetensors")["library_error"]


@pytest.mark.parametrize(
    ("action", "files", "fields", "said"),
    [
        ("shelf_convert", [], {"key_format": "kohya"}, "Choose at least one"),
        ("shelf_convert", ["old.safetensors"], {"key_format": "klingon"}, "There is no key format"),
        ("shelf_convert", ["../../etc/passwd"], {"key_format": "kohya"}, "There is no LoRA"),
        ("shelf_discard", ["notes.txt"], {}, "There is no LoRA"),
        ("shelf_resize", ["old.safetensors"], {"rank": "-3"}, "Choose a rank"),
        ("shelf_merge", ["old.safetensors"], {"weight old.safetensors": "1"}, "at least two"),
        ("shelf_merge", ["old.safetensors"], {"weight old.safetensors": "much"}, "is no number"),
        ("shelf_repair", ["old.safetensors"], {"consumer": "nobody"}, "nothing to repair"),
        ("shelf_anew", ["old.safetensors"], {}, "does not say how it was made"),
    ],
)
def test_what_is_refused(service, action, files, fields, said):
    listed(service)
    assert said in act(service, action, *files, **fields)["library_error"]
    assert not [job for job in service.queue.jobs() if job.kind not in ("library", "models", "look")]


def test_more_than_may_wait_are_refused_as_a_whole(service, monkeypatch):
    listed(service)
    monkeypatch.setattr(library, "MAX_WAITING", 1)
    told = act(service, "shelf_convert", "old.safetensors", "style.safetensors", key_format="kohya")
    assert "too many at once" in told["library_error"] and not [j for j in service.queue.jobs() if j.kind == "convert"]
    assert MAX_WAITING == 20
