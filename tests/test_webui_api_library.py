"""The library and several styles over HTTP: what is listed, what its requests start, and what they refuse.

What the jobs then do is in test_webui_library and test_webui_batch; here only the list and previews are computed."""

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
from i2l_ext.service import batches, library  # noqa: E402
from i2l_ext.service.service import Service  # noqa: E402
from i2l_ext.webui import api  # noqa: E402
from i2l_ext.webui.hosts.standalone import StandaloneHost  # noqa: E402
from test_queue import until  # noqa: E402

ENGINE = f"""
import json, subprocess, sys
line = sys.stdin.buffer.readline()
if json.loads(line)["kind"] in ("library", "look", "models"):
    engine = subprocess.Popen([sys.executable, "-m", "i2l_ext.worker.main"], stdin=subprocess.PIPE, cwd={str(ROOT)!r})
    engine.stdin.write(line)
    engine.stdin.flush()
    sys.exit(engine.wait())
print(json.dumps({{"event": "done", "result": {{"picture": "data:", "made": [{{"picture": "data:"}}]}}}}))
"""
"""It says of most jobs that they are done."""


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = shelf.lay(tmp_path_factory.mktemp("shelf"))
    shelf.lora(folder / "qwen.safetensors", "qwen-image", modules=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("I2L_CACHE", str(folder.parent / "cache"))
        host = StandaloneHost(folder.parent / "state", lora_folder=folder, serves_api=True)
        service = Service(host, folder.parent / "state", [sys.executable, "-S", "-c", ENGINE])
        app = Starlette()
        api.add_api(app, service)
        client = TestClient(app, base_url="http://localhost/i2l/v1")
        client.service, client.folder = service, folder
        until(lambda: service.models.rows() is not None, 60)
        yield client
        service.queue.close()


@pytest.fixture
def pictures():
    made = []
    for colour in ("red", "green", "blue"):
        stream = BytesIO()
        Image.new("RGB", (64, 64), colour).save(stream, "PNG")
        made.append(("pictures", (f"{colour}.png", stream.getvalue())))
    return made


def rows(client, query=""):
    answer = client.get(f"/library{query}")
    assert answer.status_code == 200, answer.text
    return {row["file"]: row for row in answer.json()["loras"]}


def asked(client, answer):
    """What the jobs of an answer ask of the engine, without what is the default."""
    assert answer.status_code == 202, answer.text
    jobs = answer.json() if isinstance(answer.json(), list) else [answer.json()]
    for job in jobs:
        client.service.queue.wait(job["id"], 60)
    requests = [client.service.queue.find(job["id"]).request for job in jobs]
    unsaid = (None, False, "", 0, 1.0)
    return [{key: value for key, value in one.items() if value is True or value not in unsaid} for one in requests]


def started(client):
    return [job.id for job in client.service.queue.jobs() if job.kind not in ("library", "models", "look")]


def test_the_list_and_its_filter(client):
    found = rows(client)
    assert set(found) == {
        "old.safetensors", "style.safetensors", "styles/other.safetensors", "half.safetensors", "qwen.safetensors",
    }  # fmt: skip
    one = found["style.safetensors"]
    assert one["arch"] == "mini" and one["rank"] == "4" and one["key_format"] == "webui" and one["preview"] is True
    assert one["made"] is None and one["loads"] == {}, "of the miniature"
    assert found["half.safetensors"].keys() == {"file", "bytes", "modified", "error", "preview"}
    assert found["qwen.safetensors"]["loads"]["sdnext"] == "all" and not found["qwen.safetensors"]["preview"]
    assert str(client.folder.parent) not in client.get("/library").text
    assert list(rows(client, "?text=MINI+oth")) == ["styles/other.safetensors"]
    assert list(rows(client, "?sort=name")) == sorted(found)
    assert list(rows(client, "?arch=qwen-image")) == list(rows(client, "?loads=sdnext")) == ["qwen.safetensors"]
    pictured = rows(client, "?previews=true")["style.safetensors"]["picture"]
    assert Image.open(BytesIO(base64.b64decode(pictured.partition(",")[2]))).format == "JPEG"
    assert client.service.library.view == library.View(), "what a page shows is its own"
    listed = [job.id for job in client.service.queue.jobs() if job.kind == "library"]
    assert len(listed) == 1, "the folder has not changed"
    shelf.lora(client.folder / "new.safetensors")
    assert "new.safetensors" in rows(client), "put there by hand"
    (client.folder / "new.safetensors").unlink()


def test_pages(client, monkeypatch):
    monkeypatch.setattr(library, "PER_PAGE", 3)
    monkeypatch.setattr(api, "PER_PAGE", 3)
    told = client.get("/library?sort=name&page=1").json()
    assert (told["count"], told["page"], told["pages"]) == (5, 1, 2) and len(told["loras"]) == 2
    assert client.get("/library?page=7").json()["page"] == 1


TWO = ["old.safetensors", "styles/other.safetensors"]


@pytest.mark.parametrize(
    ("path", "body", "requests"),
    [
        ("convert", {"loras": TWO, "to": "kohya", "dtype": "bf16"}, [
            {"file": "old", "key_format": "kohya", "dtype": "bf16", "output": "old-kohya"},
            {"file": "styles/other", "key_format": "kohya", "dtype": "bf16", "output": "other-kohya"},
        ]),
        ("convert", {"loras": ["style.safetensors"] * 2, "to": "diffsynth"}, [
            {"file": "style", "key_format": "diffsynth", "output": "style-diffsynth"},
        ]),
        ("rank", {"loras": TWO, "rank": 2}, [
            {"file": "old", "rank": 2, "output": "old-r2"}, {"file": "styles/other", "rank": 2, "output": "other-r2"},
        ]),
        ("rank", {"loras": TWO[:1], "effect_kept": 0.9, "per_module": True}, [
            {"file": "old", "effect_kept": 0.9, "per_module": True, "output": "old-effect0.9"},
        ]),
        ("merge", {"loras": TWO, "weights": [0.25, -1], "rank": 3}, [
            {"parts": ["old:0.25", "styles/other:-1.0"], "rank": 3, "output": "old-other-merged"},
        ]),
        ("repair", {"loras": ["qwen.safetensors", "old.safetensors"], "consumer": "musubi-tuner"}, [
            {"file": "qwen", "consumer": "musubi-tuner", "output": "qwen-musubi-tuner", "folder": "qwen-musubi-tuner"},
        ]),
        ("discard", {"loras": ["old.safetensors", "old.safetensors"]}, [{"files": ["old"]}]),
    ],
)  # fmt: skip
def test_what_is_started(client, path, body, requests):
    """Every path is one of the folder's own, every output a new file in it."""
    plain = {str(client.folder): "", str(client.folder.parent / "i2l-training"): "", ".safetensors": ""}
    told = json.dumps(asked(client, client.post(f"/library/{path}", json=body)))
    for text, short in plain.items():
        told = told.replace(text, short)
    assert json.loads(told.replace('"/', '"')) == requests


def test_nothing_is_overwritten(client):
    (client.folder / "old-diffusers.safetensors").write_bytes(b"mine")
    [request] = asked(client, client.post("/library/convert", json={"loras": TWO[:1], "to": "diffusers"}))
    assert Path(request["output"]).name == "old-diffusers-2.safetensors" and "overwrite" not in request
    (client.folder / "old-diffusers.safetensors").unlink()


def test_made_anew(client, pictures, monkeypatch):
    ids = [client.service.uploads.take_stream(BytesIO(data)) for _, (_, data) in pictures[:2]]
    images = [{"sha256": id, "weight": weight} for id, weight in zip(ids, (1.0, 3.0), strict=True)]
    made = {"model": "mini", "strength": 0.5, "options": {"rank": 2}, "images": images}
    told = [{"file": "style.safetensors", "made": made}]
    monkeypatch.setattr(client.service.library, "wait_for_rows", lambda timeout: told)
    monkeypatch.setattr(client.service.library, "rows", lambda: told)
    [request] = asked(client, client.post("/library/anew", json={"loras": ["style.safetensors"]}))
    assert (request["name"], request["rank"], request["strength"]) == ("style-2", 2, 0.5)
    assert request["weights"] == [1, 3] and [Path(path).name for path in request["pictures"]] == ids


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("convert", {"loras": [], "to": "kohya"}, "Choose at least one"),
        ("convert", {"loras": ["old.safetensors"], "to": "klingon"}, "There is no key format"),
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
        ("repair", {"loras": ["old.safetensors"], "consumer": "nobody"}, "nothing to repair"),
        ("discard", {"loras": ["notes.txt"]}, "There is no LoRA"),
        ("discard", {"loras": ["../Lora/old.safetensors"]}, "There is no LoRA"),
        ("anew", {"loras": ["old.safetensors"]}, "does not say how it was made"),
    ],
)
def test_what_is_refused(client, path, body, said):
    before, jobs = shelf.state(client.folder), started(client)
    answer = client.post(f"/library/{path}", json=body)
    assert answer.status_code == 422 and said in answer.json()["error"], answer.text
    assert started(client) == jobs and shelf.state(client.folder) == before


@pytest.mark.parametrize(
    ("query", "said"),
    [("?sort=wrong", "There is no sort"), ("?page=-1", "page must be"), ("?page=x", "page is not of type int"),
     ("?loads=nobody", "There is no loads"), ("?folder=/etc", "Unknown fields"),
     ("?previews=maybe", "previews is not")],
)  # fmt: skip
def test_a_query_that_is_refused(client, query, said):
    answer = client.get(f"/library{query}")
    assert answer.status_code == 422 and said in answer.json()["error"]


def test_pages_of_other_sites_are_refused(client):
    for method, path in (("GET", "/library"), ("POST", "/library/discard"), ("POST", "/batches")):
        assert client.request(method, path, headers={"origin": "http://other.example"}).status_code == 403
        assert client.request(method, path, headers={"host": "rebound.example"}).status_code == 403


def test_a_batch_of_groups(client, pictures):
    (client.folder / "ink.safetensors").write_bytes(b"of somebody else")
    answer = client.post(
        "/batches", files=pictures, data={"names": '["oil", "ink", "oil"]', "model": "mini", "rank": "2"}
    )
    assert 0 <= answer.json()["share"] <= 1 and answer.json()["kind"] == "batch"
    [request] = asked(client, answer)
    assert request["names"] == ["oil", "oil", "ink-2"] and request["rank"] == 2
    ids = [client.service.uploads.take_stream(BytesIO(data)) for _, (_, data) in pictures]
    assert [Path(path).name for path in request["pictures"]] == [ids[0], ids[2], ids[1]]
    assert client.get(f"/loras/{answer.json()['id']}").json()["result"] == {"made": [{}]}, "no pictures for a program"
    (client.folder / "ink.safetensors").unlink()


def test_a_batch_without_names_is_named_by_its_files(client, pictures):
    called = [("pictures", (name, data)) for name, (_, (_, data)) in
              zip(("../up/oil.png", "C:\\x\\oil.png", "a:b.png"), pictures, strict=True)]  # fmt: skip
    [request] = asked(client, client.post("/batches", files=called, data={"model": "mini"}))
    assert request["names"] == ["oil", "oil-2", "a-b"]


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
def test_a_batch_that_is_refused(client, pictures, form, said):
    jobs = started(client)
    answer = client.post("/batches", files=pictures[:2], data={"model": "mini", **form})
    assert answer.status_code == 422 and said in answer.json()["error"], answer.text
    assert started(client) == jobs


def test_a_batch_has_its_bounds(client, pictures, monkeypatch):
    monkeypatch.setattr(api, "MAX_GROUPED", 1)
    answer = client.post("/batches", files=pictures, data={"model": "mini"})
    assert answer.status_code == 413 and answer.json()["error"] == "At most 1 pictures."
    monkeypatch.setattr(batches, "MAX_GROUPED", 1)
    monkeypatch.setattr(api, "MAX_GROUPED", 9)
    assert "at most 1 go at once" in client.post("/batches", files=pictures, data={"model": "mini"}).json()["error"]


def test_names_of_a_batch_that_waits_are_given(client, pictures, monkeypatch):
    """Two batches, or a batch and a LoRA, asked for at once under one name: none is lost to the other."""
    service = client.service
    monkeypatch.setattr(service.queue, "_next", lambda lane: None)
    ids = [service.uploads.take_stream(BytesIO(data)) for _, (_, data) in pictures[:2]]
    jobs = [
        batches.make_groups(service, [("same", ids[:1])], model="mini"),
        batches.make_groups(service, [("same", ids), ("same", ids[:1])], model="mini"),
        service.make(ids, name="same", model="mini"),
    ]
    assert [job.request.get("names") or job.request["name"] for job in jobs] == [
        ["same"], ["same-2", "same-2", "same-3"], "same-4",
    ]  # fmt: skip
    for job in jobs:
        service.queue.cancel(job.id)
