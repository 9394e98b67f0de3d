"""The library and several styles over HTTP: what is listed, what its requests start, and what they refuse."""

import base64
import json
import sys
from io import BytesIO
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")
pytest.importorskip("python_multipart")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from PIL import Image  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from attacks import shelf  # noqa: E402
from i2l_ext.converters.inspection import inspect  # noqa: E402
from i2l_ext.service import batches, library  # noqa: E402
from i2l_ext.service.service import Service  # noqa: E402
from i2l_ext.webui import api  # noqa: E402
from i2l_ext.webui.hosts.standalone import StandaloneHost  # noqa: E402
from test_queue import SMALL, until  # noqa: E402


@pytest.fixture
def client(world, tmp_path, monkeypatch):
    monkeypatch.setenv("I2L_TEST_SMALL", "1")
    monkeypatch.setenv("I2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    folder = shelf.lay(tmp_path)
    host = StandaloneHost(tmp_path / "state", lora_folder=folder, serves_api=True)
    service = Service(host, tmp_path / "state", SMALL)
    app = Starlette()
    api.add_api(app, service)
    client = TestClient(app, base_url="http://localhost/i2l/v1")
    client.service, client.folder = service, folder
    yield client
    service.queue.close()


def rows(client, query=""):
    answer = client.get(f"/library{query}")
    assert answer.status_code == 200, answer.text
    return {row["file"]: row for row in answer.json()["loras"]}


def done(client, answer):
    """The jobs of an answer, once they have ended well."""
    assert answer.status_code == 202, answer.text
    jobs = answer.json() if isinstance(answer.json(), list) else [answer.json()]
    for job in jobs:
        client.service.queue.wait(job["id"], 120)
    seen = [client.get(f"/loras/{job['id']}").json() for job in jobs]
    assert all(job["state"] == "done" for job in seen), seen
    assert str(client.folder.parent) not in json.dumps(seen), "no folder of this machine"
    return seen


def test_the_list_and_its_filter(client):
    found = rows(client)
    assert set(found) == {"old.safetensors", "style.safetensors", "styles/other.safetensors", "half.safetensors"}
    one = found["style.safetensors"]
    assert one["arch"] == "mini" and one["rank"] == "4" and one["dialect"] == "webui" and one["preview"] is True
    assert one["made"] is None and one["loads"] == {}, "of the miniature"
    assert found["half.safetensors"].keys() == {"file", "bytes", "modified", "error", "preview"}
    assert str(client.folder.parent) not in client.get("/library").text
    assert list(rows(client, "?text=MINI+oth")) == ["styles/other.safetensors"]
    assert list(rows(client, "?sort=name")) == sorted(found) and not rows(client, "?arch=qwen-image")
    assert not rows(client, "?loads=comfyui"), "no program loads a LoRA of the miniature"
    pictured = rows(client, "?previews=true")["style.safetensors"]["picture"]
    assert Image.open(BytesIO(base64.b64decode(pictured.partition(",")[2]))).format == "JPEG"
    assert client.service.library.view == library.View(), "what a page shows is its own"


def test_pages(client, monkeypatch):
    monkeypatch.setattr(library, "PER_PAGE", 3)
    monkeypatch.setattr(api, "PER_PAGE", 3)
    told = client.get("/library?sort=name&page=1").json()
    assert (told["count"], told["page"], told["pages"]) == (4, 1, 2) and len(told["loras"]) == 1
    assert client.get("/library?page=7").json()["page"] == 1


def test_it_knows_what_was_put_there_by_hand(client):
    rows(client)
    shelf.lora(client.folder / "new.safetensors")
    assert "new.safetensors" in rows(client)


def test_several_at_once(client):
    two = ["old.safetensors", "styles/other.safetensors"]
    converted = done(client, client.post("/library/convert", json={"loras": two, "to": "kohya", "dtype": "bf16"}))
    assert [job["title"] for job in converted] == ["old-kohya", "other-kohya"]
    again = done(client, client.post("/library/convert", json={"loras": two[:1] * 2, "to": "kohya"}))
    assert [job["title"] for job in again] == ["old-kohya-2"], "nothing is overwritten, and each is told once"
    done(client, client.post("/library/rank", json={"loras": two, "rank": 2}))
    done(client, client.post("/library/rank", json={"loras": two[:1], "energy": 0.9, "per_module": True}))
    [merged] = done(client, client.post("/library/merge", json={"loras": two, "weights": [0.25, -1], "rank": 3}))
    found = rows(client)
    assert found["other-kohya.safetensors"]["dialect"] == "kohya" and found["other-r2.safetensors"]["rank"] == "2"
    assert "old-energy0.9.safetensors" in found and found[merged["result"]["file"]]["rank"] == "3"
    told = inspect(client.folder / merged["result"]["file"], values=False).metadata["i2l.merged"]
    assert [one["weight"] for one in json.loads(told)] == [0.25, -1.0]
    assert set(inspect(client.folder / "old-kohya.safetensors").dtypes) == {"BF16"}


def test_repaired_for_a_program(client):
    file = shelf.lora(client.folder / "qwen.safetensors", "qwen-image")
    assert "musubi-tuner" in rows(client)["qwen.safetensors"]["mends"]
    [mended] = done(client, client.post("/library/mend", json={"loras": [file.name], "consumer": "musubi-tuner"}))
    assert rows(client)[mended["result"]["file"]]["loads"]["musubi-tuner"] == "all"


def test_into_the_trash(client):
    done(client, client.post("/library/discard", json={"loras": ["old.safetensors", "old.safetensors"]}))
    assert not (client.folder / "old.safetensors").exists() and not (client.folder / "old.json").exists()
    assert "old.safetensors" not in rows(client) and (client.folder / "notes.txt").exists()


def test_made_anew(client, world):
    files = [("pictures", ("a.png", path.read_bytes())) for path in world.pictures[:2]]
    form = {"name": "it", "model": "small", "weights": "[1, 3]", "strength": "0.5", "rank": "2"}
    [first] = done(client, client.post("/loras", files=files, data=form))
    [again] = done(client, client.post("/library/anew", json={"loras": ["it.safetensors"]}))
    assert again["result"]["name"] == "it-2" and again["result"]["images"] == first["result"]["images"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("convert", {"loras": [], "to": "kohya"}, "Choose at least one"),
        ("convert", {"loras": ["old.safetensors"], "to": "klingon"}, "There is no dialect"),
        ("convert", {"loras": ["../../etc/passwd"], "to": "kohya"}, "There is no LoRA"),
        ("convert", {"loras": ["/etc/passwd"], "to": "kohya"}, "There is no LoRA"),
        ("convert", {"loras": "old.safetensors", "to": "kohya"}, "loras is not of type list"),
        ("convert", {"loras": [7], "to": "kohya"}, "loras is not of type list"),
        ("convert", {"loras": ["old.safetensors"]}, "Send an object with the fields loras, to and, if you like"),
        ("convert", {"loras": ["old.safetensors"], "to": "kohya", "output": "/tmp/x"}, "Send an object"),
        ("convert", {"loras": ["old.safetensors"], "to": "kohya", "overwrite": True}, "Send an object"),
        ("convert", {"loras": ["old.safetensors"], "to": "kohya", "base": "/etc/passwd"}, "Send an object"),
        ("rank", {"loras": ["old.safetensors"], "rank": 0}, "rank must be from 1"),
        ("rank", {"loras": ["old.safetensors"]}, "Give a rank or a share"),
        ("rank", {"loras": ["old.safetensors"], "rank": None}, "rank is not of type int"),
        ("merge", {"loras": ["old.safetensors"], "weights": [1]}, "at least two"),
        ("merge", {"loras": ["old.safetensors", "style.safetensors"], "weights": [1]}, "one weight for each"),
        ("mend", {"loras": ["old.safetensors"], "consumer": "nobody"}, "nothing to mend"),
        ("discard", {"loras": ["notes.txt"]}, "There is no LoRA"),
        ("discard", {"loras": ["../Lora/old.safetensors"]}, "There is no LoRA"),
        ("anew", {"loras": ["old.safetensors"]}, "does not say how it was made"),
    ],
)
def test_what_is_refused(client, path, body, said):
    before = shelf.state(client.folder)
    answer = client.post(f"/library/{path}", json=body)
    assert answer.status_code == 422 and said in answer.json()["error"], answer.text
    assert not [job for job in client.service.queue.jobs() if job.kind not in ("library", "models", "look")]
    assert shelf.state(client.folder) == before


@pytest.mark.parametrize(
    ("query", "said"),
    [("?sort=wrong", "There is no sort"), ("?page=-1", "page must be"), ("?page=x", "page is not of type int"),
     ("?loads=nobody", "There is no loads"), ("?folder=/etc", "Unknown fields"), ("?previews=maybe", "previews is not")],
)  # fmt: skip
def test_a_query_that_is_refused(client, query, said):
    answer = client.get(f"/library{query}")
    assert answer.status_code == 422 and said in answer.json()["error"]


def test_pages_of_other_sites_are_refused(client):
    for method, path in (("GET", "/library"), ("POST", "/library/discard"), ("POST", "/batches")):
        asked = {"headers": {"origin": "http://other.example"}}
        assert client.request(method, path, **asked).status_code == 403
        assert client.request(method, path, headers={"host": "rebound.example"}).status_code == 403


def test_a_batch_of_groups(client, world):
    (client.folder / "ink.safetensors").write_bytes(b"of somebody else")
    files = [("pictures", (path.name, path.read_bytes())) for path in world.pictures]
    files.append(("pictures", ("broken.png", b"no picture")))
    form = {"names": '["oil", "ink", "oil", "bad"]', "model": "small", "rank": "2"}
    answer = client.post("/batches", files=files, data=form)
    assert answer.status_code == 202 and 0 <= answer.json()["share"] <= 1
    [job] = done(client, answer)
    result = job["result"]
    assert [(one["name"], len(one["images"])) for one in result["made"]] == [("oil", 2), ("ink-2", 1)]
    assert [one["name"] for one in result["skipped"]] == ["bad"] and result["asked"] == 3
    assert result["skipped"][0]["reason"] and "data:image" not in json.dumps(job)
    assert (client.folder / "ink.safetensors").read_bytes() == b"of somebody else"
    assert rows(client)["oil.safetensors"]["made"]["options"]["rank"] == 2


def test_a_batch_without_names_is_named_by_its_files(client, world):
    files = [("pictures", (name, path.read_bytes()))
             for name, path in zip(("../up/oil.png", "C:\\x\\oil.png", ""), world.pictures, strict=True)]  # fmt: skip
    [job] = done(client, client.post("/batches", files=files[:2], data={"model": "small"}))
    assert [one["name"] for one in job["result"]["made"]] == ["oil", "oil-2"]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"names": '["a"]'}, "2 pictures and 1 names"),
        ({"names": '["a", "../b"]'}, "contains"),
        ({"names": '["a", ""]'}, "name"),
        ({"names": "a"}, "names is not of type list"),
        ({"name": "a"}, "Unknown fields: name"),
        ({"weights": "[1, 1]"}, "Unknown fields: weights"),
        ({"grey": "true"}, "Unknown fields: grey"),
        ({"folder": "/tmp"}, "Unknown fields: folder"),
        ({"subfolder": "../up"}, "name"),
        ({"rank": "0"}, "rank must be"),
        ({"model": "none"}, "none"),
    ],
)
def test_a_batch_that_is_refused(client, world, form, said):
    until(lambda: client.service.models.rows() is not None, 60)
    files = [("pictures", (path.name, path.read_bytes())) for path in world.pictures[:2]]
    answer = client.post("/batches", files=files, data={"model": "small", **form})
    assert answer.status_code == 422 and said in answer.json()["error"], answer.text
    assert not [job for job in client.service.queue.jobs() if job.kind == "batch"]


def test_a_batch_has_its_bounds(client, world, monkeypatch):
    monkeypatch.setattr(api, "MAX_GROUPED", 1)
    files = [("pictures", (path.name, path.read_bytes())) for path in world.pictures[:2]]
    answer = client.post("/batches", files=files, data={"model": "small"})
    assert answer.status_code == 413 and answer.json()["error"] == "At most 1 pictures."
    monkeypatch.setattr(batches, "MAX_GROUPED", 1)
    monkeypatch.setattr(api, "MAX_GROUPED", 9)
    assert "at most 1 go at once" in client.post("/batches", files=files, data={"model": "small"}).json()["error"]


def test_names_of_a_batch_that_waits_are_given(client, world):
    """Two batches, or a batch and a LoRA, asked for at once under one name: none is lost to the other."""
    ids = [client.service.uploads.take(path) for path in world.pictures[:2]]
    first = batches.make_groups(client.service, [("same", ids[:1])], model="small")
    second = batches.make_groups(client.service, [("same", ids[1:]), ("same", ids[:1])], model="small")
    third = client.service.make(ids, name="same", model="small")
    made = [client.service.queue.wait(job.id, 120).result for job in (first, second, third)]
    assert [one["name"] for result in made[:2] for one in result["made"]] == ["same", "same-2", "same-3"]
    assert made[2]["name"] == "same-4"
