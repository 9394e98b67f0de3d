"""The HTTP interface: what it answers, whom it lets in, and the examples of its documentation."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from starlette.applications import Starlette  # noqa: E402

import template_world  # noqa: E402
from i2l_ext.engine import queue  # noqa: E402
from i2l_ext.requests import MakeRequest  # noqa: E402
from i2l_ext.service import uploads  # noqa: E402
from i2l_ext.service.service import Service  # noqa: E402
from i2l_ext.webui import api, client_fields, results  # noqa: E402
from i2l_ext.webui.hosts.standalone import StandaloneHost  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def serve(tmp_path, credentials=()):
    host = StandaloneHost(tmp_path, lora_folder=tmp_path / "Lora", serves_api=True)
    service = Service(host, tmp_path, [sys.executable, "-m", "i2l_ext.worker.main"])
    app = Starlette()
    api.add_api(app, service, credentials)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    return server, thread, service, server.servers[0].sockets[0].getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("api")
    server, thread, service, port = serve(tmp_path)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/i2l/v1", timeout=60) as client:
        client.service, client.folder, client.port = service, tmp_path / "Lora", port
        while client.get("/models").status_code == 503:
            time.sleep(0.2)
        yield client
    server.should_exit = True
    thread.join(5)
    service.queue.close()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.effect_mandelbrot((200, 160), (-2, -1, 1, 1), 20).convert("RGB").save(path)
    return path


def wait(client, job):
    while (seen := client.get(f"/loras/{job['id']}").json())["state"] in ("waiting", "running", "stopping"):
        time.sleep(0.1)
    return seen


def test_squares_of_one_picture(served, picture):
    files = [("pictures", ("a.png", picture.read_bytes()))] * 2
    data = {"name": "squares", "model": "mini", "crops": '["0,0,160", "40,0,160"]'}
    done = wait(served, served.post("/loras", files=files, data=data).json())
    assert done["state"] == "done", done
    assert [one["crop"] for one in done["result"]["images"]] == ["0,0,160", "40,0,160"]
    for crops in ('["here"]', '["0,0,160"]', "0,0,160", "[1]", '["0,0,0", "0,0,1"]'):
        answer = served.post("/loras", files=files, data={**data, "crops": crops})
        assert answer.status_code == 422 and any(word in answer.json()["error"] for word in ("square", "crops"))


def test_pictures_in_a_lora_out(served, picture):
    files = [("pictures", ("../../evil.png", picture.read_bytes())), ("pictures", ("b.png", picture.read_bytes()))]
    answer = served.post("/loras", files=files, data={"name": "by_api", "model": "mini", "weights": "[1, 2]"})
    assert answer.status_code == 202, answer.text
    done = wait(served, answer.json())
    assert done["state"] == "done", done
    assert done["result"]["file"] == "by_api.safetensors" and "picture" not in done["result"]
    assert done["id"] in [job["id"] for job in served.get("/loras").json()]
    seen = wait(served, served.post("/inspect", json={"lora": "by_api.safetensors"}).json())
    assert seen["result"]["arch"] == "mini" and seen["result"]["check"]["consumers"]
    made = wait(served, served.post("/convert", json={"lora": "by_api.safetensors", "to": "kohya"}).json())
    assert (served.folder / made["result"]["file"]).is_file()
    said = wait(
        served, served.post("/export", json={"lora": "by_api.safetensors", "trainer": "diffusers", "rank": 4}).json()
    )
    assert (served.folder.parent / said["result"]["folder"] / said["result"]["run"]).is_file()
    told = served.get("/loras").text + served.get("/models").text
    assert str(served.folder.parent) not in told and str(ROOT) not in told and str(Path.home()) + "/" not in told


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "/loras", {"data": {"name": "x"}}, 415),
        ("POST", "/loras", {"files": [("pictures", b"x")], "data": {"name": "a/../b"}}, 422),
        ("POST", "/loras", {"files": [("pictures", b"x")], "data": {"name": "x", "subfolder": "../up"}}, 422),
        ("POST", "/loras", {"files": [("pictures", b"x")], "data": {"name": "x", "subfolder": "/tmp"}}, 422),
        ("POST", "/loras", {"files": [("pictures", b"x")], "data": {"name": "x", "model": "no"}}, 422),
        ("POST", "/loras", {"files": [("pictures", b"x")], "data": {"name": "x", "folder": "/"}}, 422),
        ("POST", "/loras", {"files": [("pictures", b"x")], "data": {"name": "x", "strength": "nan"}}, 422),
        ("POST", "/loras", {"files": [("pictures", b"")], "data": {"name": "x"}}, 422),
        ("POST", "/inspect", {"json": {"lora": "/etc/passwd"}}, 422),
        ("POST", "/inspect", {"json": {"lora": "../../../etc/passwd"}}, 422),
        ("POST", "/inspect", {"json": {"lora": 7}}, 422),
        ("POST", "/inspect", {"json": []}, 422),
        ("POST", "/inspect", {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ("POST", "/inspect", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ("POST", "/inspect", {"json": {"lora": "x" * (1 << 17)}}, 413),
        ("POST", "/export", {"json": {"lora": "x", "trainer": "rm -rf", "rank": 1}}, 422),
        ("POST", "/download", {"json": {"model": "z-image-style", "source": "huggingface", "agree": False}}, 422),
        ("POST", "/download", {"json": {"model": "z-image-style", "source": "elsewhere", "agree": True}}, 422),
        ("POST", "/download", {"json": {"model": "../evil", "source": "huggingface", "agree": True}}, 422),
        ("POST", "/download", {"json": {"model": "z-image-style"}}, 422),
        ("POST", "/trust", {"json": {"model": "z-image-v2"}}, 422),
        ("POST", "/trust", {"json": {"model": "../evil", "digest": ""}}, 422),
        ("POST", "/download", {"json": {"model": "z-image-style", "source": "huggingface", "agree": 1}}, 422),
        ("GET", "/loras/none", {}, 404),
        ("DELETE", "/loras/none", {}, 404),
    ],
)  # fmt: skip
def test_refusals(served, method, path, options, status):
    answer = served.request(method, path, **options)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"} and "Traceback" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:1"},
        {"host": "evil.example"}, {"host": "127.0.0.1.evil.example:80"}, {"host": "[bad"}, {"host": ""},
        {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
    ],
)  # fmt: skip
def test_other_sites_are_kept_out(served, headers):
    assert served.get("/models", headers=headers).status_code in (400, 403)


def test_its_own_page_is_let_in(served):
    headers = {"origin": f"http://127.0.0.1:{served.port}", "sec-fetch-site": "same-origin"}
    assert served.get("/models", headers=headers).status_code == 200


def test_limits(served, picture, monkeypatch):
    def ask(pictures=1, **data):
        files = [("pictures", (f"{number}.png", picture.read_bytes())) for number in range(pictures)]
        return served.post("/loras", files=files, data={"name": "limits", "model": "mini", **data})

    assert ask(65).status_code == 413 and "64" in ask(65).json()["error"]
    assert served.post("/loras", files=[("pictures", b"x")], data={str(n): "x" for n in range(2000)}).status_code == 400
    monkeypatch.setattr(api, "MAX_FORM", 1000)
    assert ask().status_code == 413
    monkeypatch.undo()
    monkeypatch.setattr(uploads, "MAX_BYTES", 1000)
    assert ask().status_code == 422
    monkeypatch.undo()
    monkeypatch.setattr(queue, "MAX_WAITING", 0)
    assert ask().status_code == 429 and "waiting" in ask().json()["error"]
    monkeypatch.undo()
    assert not [job for job in served.get("/loras").json() if job["title"].startswith("limits")]


def test_a_download_tells_its_licences_first(served):
    [row] = [row for row in served.get("/models").json() if row["name"] == "qwen-image-style"]
    assert {part["id"]: part["licence"] for part in row["parts"]}["dinov3-7b"].startswith("Apache-2.0 as re-hosted")
    assert all(part["repo"] and not part["present"] and "path" not in part for part in row["parts"])
    asked = {"model": "qwen-image-style", "source": "modelscope", "agree": False}
    assert "DINOv3 licence" in served.post("/download", json=asked).json()["error"]
    done = wait(served, served.post("/download", json={**asked, "model": "mini", "agree": True, "packed": True}).json())
    assert done["state"] == "done" and done["result"]["files"] == []


def test_a_model_need_not_be_named(served, picture, monkeypatch):
    files = [("pictures", ("a.png", picture.read_bytes()))]
    made = wait(served, served.post("/loras", files=files, data={"name": "unnamed_model"}).json())
    assert made["result"]["model"] == served.service.models.choose() == "mini", "where no other is here"
    monkeypatch.setattr(served.service.models, "rows", lambda: None)
    assert served.post("/loras", files=files, data={"name": "too_early"}).status_code == 503
    assert served.post("/download", json={"model": "mini", "source": "huggingface", "agree": True}).status_code == 503


def test_no_path_is_among_the_fields(served, picture):
    """Neither one that is offered, nor one that a request has besides."""
    offered = [
        *client_fields.QUERY.values(),
        *(
            field
            for table in (client_fields.FORMS, client_fields.BODIES, client_fields.OPTIONAL)
            for fields in table.values()
            for field in fields.values()
        ),
    ]
    assert not [field.name for field in offered if field.info.local or field.type is Path]
    files = [("pictures", ("a.png", picture.read_bytes()))]
    for name in [name for name, field in MakeRequest.fields().items() if field.info.local and name != "pictures"]:
        answer = served.post("/loras", files=files, data={"name": "x", name: "/tmp"})
        assert answer.status_code == 422 and f"Unknown fields: {name}" in answer.json()["error"]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"rank": "4097"}, "rank must be from 1 to 4096, not 4097."),
        ({"strength": "-10.5"}, "strength must be from -10 to 10 and not 0"),
        ({"weights": "[0]"}, "weight must be greater than 0"),
        ({"dtype": "fp8"}, "There is no dtype 'fp8'"),
        ({"description": "a\0b"}, "description is not a text"),
    ],
)
def test_ranges_are_those_of_the_requests(served, picture, data, error):
    files = [("pictures", ("a.png", picture.read_bytes()))]
    answer = served.post("/loras", files=files, data={"name": "x", "model": "mini", **data})
    assert answer.status_code == 422 and error in answer.json()["error"]


@pytest.mark.parametrize("rank", ["4", 4.0, True, None, [4], 1 << 60])
def test_fields_are_of_their_type(served, rank):
    answer = served.post("/export", json={"lora": "x", "trainer": "diffusers", "rank": rank})
    assert (answer.status_code, answer.json()) == (422, {"error": "rank is not of type int."})


def test_a_body_without_length(served):
    answer = served.post("/inspect", content=iter([b"{}"]), headers={"content-type": "application/json"})
    assert answer.status_code == 411


def test_credentials(tmp_path):
    server, thread, service, port = serve(tmp_path, [("me", "secret")])
    url = f"http://127.0.0.1:{port}/i2l/v1/loras"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, auth=("me", "wrong")).status_code == 401
    assert httpx.get(url, headers={"authorization": "Basic !!"}).status_code == 401
    assert httpx.get(url, auth=("me", "secret")).status_code == 200
    server.should_exit = True
    thread.join(5)
    service.queue.close()


def test_the_description_names_every_route(served):
    told = served.get("/openapi.json").json()
    assert set(told["paths"]) == {
        "/loras", "/loras/{id}", "/inspect", "/convert", "/export", "/models", "/download", "/trust", "/batches",
        "/library", "/library/convert", "/library/repair", "/library/rank", "/library/merge", "/library/discard",
        "/library/anew",
    }  # fmt: skip


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here")
def test_the_examples_of_the_documentation(served, picture):
    text = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
    examples = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 4
    folder = picture.parent
    known = {job["id"] for job in served.get("/loras").json()}  # other tests have let some fail
    for example in examples:
        script = example.replace("127.0.0.1:7860", f"127.0.0.1:{served.port}")
        out = subprocess.run(["sh", "-ec", script], cwd=folder, capture_output=True, text=True, timeout=60)
        assert out.returncode == 0 and not out.stdout.startswith('{"error"'), (example, out)
        for job in served.get("/loras").json():
            if job["id"] not in known:
                known.add(job["id"])
                ended = wait(served, job)
                assert ended["state"] in ("done", "cancelled"), (example, ended)  # one of them shows how to cancel


@pytest.mark.parametrize("model", template_world.targets("klein-4b-v2"))
def test_a_v2_model_over_http(served, picture, tmp_path, monkeypatch, model):
    """Shown, refused, agreed to at this machine alone, made: a template of our own through the registry's diffsynth."""
    import torch
    from PIL import Image

    from i2l_ext.converters import Lora, inspect
    from i2l_ext.models import catalogue

    models, known = served.folder.parent / "models", catalogue.MODELS[model]
    folder = template_world.write_template(models / known.template.repo, known.arch)
    served.service.host.settings_file.write({"i2l_models_folder": str(models), "i2l_diffsynth": str(
        template_world.environment(tmp_path / "ds"))})  # fmt: skip
    answer = served.post("/trust", json={"model": model, "digest": "0" * 64})
    assert answer.status_code == 422 and "not shown yet" in answer.json()["error"]
    shown = wait(served, served.post("/trust", json={"model": model, "digest": ""}).json())
    assert shown["state"] == "done" and not shown["result"]["agreed"], shown
    assert "class Emb2Lora" in shown["result"]["text"] and "model.safetensors" in shown["result"]["files"]
    Image.new("RGB", (64, 64), (200, 40, 10)).save(tmp_path / "red.png")
    form = {"data": {"model": model, "name": model, "key_format": "kohya", "dtype": "fp32"},
            "files": {"pictures": (tmp_path / "red.png").read_bytes()}}  # fmt: skip
    refused = wait(served, served.post("/loras", **form).json())
    assert refused["code"] == "untrusted" and "have not agreed" in refused["error"]
    digest = shown["result"]["digest"]
    monkeypatch.setattr(served.service.host, "is_local", False)
    answer = served.post("/trust", json={"model": model, "digest": digest})
    assert answer.status_code == 403 and "at the machine itself" in answer.json()["error"]
    monkeypatch.undo()
    agreed = wait(served, served.post("/trust", json={"model": model, "digest": digest}).json())
    assert agreed["result"]["agreed"]
    made = wait(served, served.post("/loras", **form).json())
    assert made["state"] == "done" and made["result"]["arch"] == known.arch.id, made
    file = served.folder / made["result"]["file"]
    ours, theirs = Lora.read(file), template_world.run_here(folder, [(200, 40, 10)])
    assert inspect(file).key_format == "kohya" and len(ours) == 3
    for path in ours:
        update = theirs[f"{path}.lora_B.default.weight"] @ theirs[f"{path}.lora_A.default.weight"]
        torch.testing.assert_close(ours.delta(path), update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lossy", ["true", "false"])
def test_what_fp16_loses_is_told_and_refused_unless_asked_for(served, picture, lossy):
    files = [("pictures", ("a.png", picture.read_bytes()))]
    data = {"name": "faint", "model": "mini", "strength": "1e-6", "dtype": "fp16", "lossy": lossy}
    done = wait(served, served.post("/loras", files=files, data=data).json())
    if lossy == "false":
        assert done["state"] == "failed" and "of its update is lost" in done["error"]
        return
    assert done["state"] == "done" and done["result"]["lost"] > 0.01
    job = served.service.queue.find(done["id"])
    assert done["result"]["loss"] in str(results.show_make(job, [], served.service.host))
