"""Who is let in, and what a client can make us touch. Each guard that is tried here is taken out in turn by
``python benchmarks/guards.py``, and these tests must notice."""

import json
import os
import socket
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")

from starlette.datastructures import Headers  # noqa: E402

from i2l_ext.converters.errors import UserError  # noqa: E402
from i2l_ext.engine import queue  # noqa: E402
from i2l_ext.library.names import check_name  # noqa: E402
from i2l_ext.service import uploads  # noqa: E402
from i2l_ext.service.service import Service  # noqa: E402
from i2l_ext.service.settings import SETTINGS  # noqa: E402
from i2l_ext.webui import handlers, standalone  # noqa: E402
from i2l_ext.webui.access import LOCAL_NAMES, AccessMiddleware, AccessPolicy  # noqa: E402
from i2l_ext.webui.hosts.standalone import StandaloneHost  # noqa: E402
from i2l_ext.webui.statuses import status_of  # noqa: E402

GOOD = {"host": "localhost:7860"}
PAGE = {"host": "sd.example:7860", "origin": "http://sd.example:7860"}

STRANGERS = {
    "a page of another site": {"origin": "http://evil.example"},
    "a page from a file": {"origin": "null"},
    "another server on this machine": {"origin": "http://localhost:3000"},
    "a form of another site": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    "another port's form": {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},
    "a frame": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
    "a picture": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
}
REBOUND = ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", "localhost.", "",
           "[bad", "0x7f000001", "2130706433", "127.1", "loc\u0430lhost")  # fmt: skip
VISIT = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


@pytest.mark.parametrize("headers", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("names", [LOCAL_NAMES, None])
def test_pages_of_other_sites_are_refused(headers, names):
    with pytest.raises(UserError):
        AccessPolicy(names).check("GET", {**GOOD, **headers})


@pytest.mark.parametrize("host", REBOUND)
def test_a_name_that_was_made_to_point_here_is_refused(host):
    with pytest.raises(UserError):
        AccessPolicy(LOCAL_NAMES).check("GET", {"host": host, "origin": f"http://{host}"})
    with pytest.raises(UserError):
        AccessPolicy(LOCAL_NAMES).check("GET", {"host": host})


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:7860", "[::1]:7860", "192.168.1.5:7860"])
def test_our_own_page_is_let_in(host):
    AccessPolicy(LOCAL_NAMES).check("POST", {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"})
    AccessPolicy(LOCAL_NAMES).check("GET", {"host": host, **VISIT})


def test_a_visit_by_a_link_does_nothing():
    with pytest.raises(UserError):
        AccessPolicy(LOCAL_NAMES).check("POST", {**GOOD, **VISIT})


def test_names_are_those_that_were_given():
    AccessPolicy(["SD.example"]).check("POST", PAGE)
    AccessPolicy(None).check("POST", PAGE)
    with pytest.raises(UserError):
        AccessPolicy(LOCAL_NAMES).check("POST", PAGE)


@pytest.mark.parametrize("said", ["", "Basic", "Basic !!", "Basic bWU6", "Basic bWU6d3Jvbmc=", "Bearer bWU6c2VjcmV0"])
def test_credentials_that_are_wrong(said):
    policy = AccessPolicy(LOCAL_NAMES, [("me", "secret"), ("you", "other")])
    with pytest.raises(UserError) as refused:
        policy.check("GET", {**GOOD, "authorization": said})
    assert status_of(refused.value) == 401
    policy.check("GET", {**GOOD, "authorization": "basic bWU6c2VjcmV0"})  # me:secret


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The stand-alone page, served: (a client, the folder it keeps its things in)."""
    folder = tmp_path_factory.mktemp("door")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("I2L_STATE", str(folder / "state"))
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        engine = [sys.executable, "-c", "raise SystemExit(9)"]
        blocks, service = standalone.start_page(
            "127.0.0.1", free_port(), lora_folder=folder / "Lora", names=["sd.example"], command=engine
        )
        with httpx.Client(base_url=blocks.local_url, timeout=120, follow_redirects=True) as client:
            client.service, client.blocks, client.folder = service, blocks, folder
            yield client
        blocks.close()
        service.queue.close()


def test_the_stand_alone_page_answers_to_its_names(page):
    for headers in ({}, PAGE, VISIT, {"host": "localhost"}):
        assert page.get("/", headers=headers).status_code == 200
        assert page.get("/config", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/gradio_api/file=x", "/i2l/v1/models"])
@pytest.mark.parametrize("headers", [*STRANGERS.values(), *({"host": name} for name in REBOUND[:5])])
def test_the_stand_alone_page_refuses_strangers(page, path, headers):
    assert page.get(path, headers=headers).status_code == 403


def test_strangers_cannot_upload(page):
    sent = {"files": ("a.png", b"x")}
    assert page.post("/gradio_api/upload", files=sent, headers={"origin": "http://evil.example"}).status_code == 403
    assert page.post("/gradio_api/upload", files=sent).status_code == 200


def test_a_socket_is_refused_to_strangers():
    import asyncio

    async def inside(scope, receive, send):
        await send({"type": "websocket.accept"})

    def knock(headers):
        said = []

        async def send(message):
            said.append(message["type"])

        scope = {"type": "websocket", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
        asyncio.run(AccessMiddleware(inside, AccessPolicy(LOCAL_NAMES))(scope, None, send))
        return said

    assert knock(GOOD) == ["websocket.accept"]
    assert knock({**GOOD, "origin": "http://evil.example"}) == ["websocket.close"]


@pytest.mark.parametrize("path", ["{root}/pyproject.toml", "../../../../etc/passwd", "/etc/passwd", "{state}/settings.json"])  # fmt: skip  # noqa: E501
def test_gradio_hands_out_none_of_our_files(page, path):
    (page.folder / "state" / "settings.json").write_text("{}")
    root = Path(__file__).resolve().parent.parent
    answer = page.get(f"/gradio_api/file={path.format(root=root, state=page.folder / 'state')}")
    assert answer.status_code in (403, 404)


def test_a_folder_on_the_server_is_for_those_who_sit_at_it(tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    near = Headers({"host": "localhost:7860"})
    assert handlers.folder_pictures(str(tmp_path), near) == [tmp_path / "a.png"]
    for folder, headers in [
        (str(tmp_path), Headers({"host": "x.tunnel.example"})),
        ("", near), ("relative", near), (str(tmp_path / "a.png"), near), (str(tmp_path / "none"), near),
    ]:  # fmt: skip
        with pytest.raises(UserError):
            handlers.folder_pictures(folder, headers)


@pytest.mark.parametrize(("address", "offered"), [("127.0.0.1", True), ("0.0.0.0", False)])  # noqa: S104
def test_a_page_in_the_network_offers_no_folder_of_the_server(tmp_path, address, offered):
    import gradio as gr

    from i2l_ext.service.host import LOCAL_ADDRESSES
    from i2l_ext.service.service import Service
    from i2l_ext.webui.tab import build_tab

    service = Service(
        StandaloneHost(tmp_path, lora_folder=tmp_path, is_local=address in LOCAL_ADDRESSES),
        tmp_path,
        [sys.executable, "-c", ""],
    )
    with gr.Blocks():
        assert ("server_folder" in build_tab(service)) is offered
    service.queue.close()


def call(page, name, event, *values, headers=None):
    """Press a button of the served page, as a browser does."""
    config = page.get("/config").json()
    id = next(one["id"] for one in config["components"] if one["props"].get("elem_id") in (name, f"i2l_{name}"))
    index = next(one["id"] for one in config["dependencies"] if [id, event] in [list(t) for t in one["targets"]])
    asked = {"fn_index": index, "data": list(values), "session_hash": "x"}
    return page.post("/gradio_api/run/predict", json=asked, headers=headers)


def test_the_served_button_for_folders(page, tmp_path):
    """The handler is given the request by gradio, and refuses by its Host."""
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    asked = (page, "add_folder", "click", str(tmp_path), json.dumps({"pictures": []}))
    assert handlers.NOT_LOCAL in call(*asked, headers={"host": "sd.example"}).json()["data"][0]
    assert not page.service.uploads.folder.exists()
    assert handlers.NOT_LOCAL not in call(*asked).json()["data"][0]
    assert len(list(page.service.uploads.folder.iterdir())) == 1


def test_the_folders_of_the_settings_are_changed_at_this_machine_alone(page, tmp_path):
    def keep(headers, **changed):
        values = [changed.get(option.key, option.default) for option in SETTINGS]
        call(page, SETTINGS[0].key.replace("i2l_", "setting_"), "change", *values, headers=headers)
        return page.service.host.settings_file.read()

    far = {"host": "sd.example"}
    assert keep(far, i2l_lora_folder=str(tmp_path))["i2l_lora_folder"] == ""
    assert keep(far, i2l_device="cpu")["i2l_device"] == "cpu"
    assert keep(None, i2l_lora_folder=str(tmp_path))["i2l_lora_folder"] == str(tmp_path)
    assert keep(far, i2l_lora_folder=str(tmp_path), i2l_device="cpu")["i2l_device"] == "cpu"
    assert keep(None)["i2l_lora_folder"] == ""


# --- what a client can make us touch ------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path):
    service = Service(
        StandaloneHost(tmp_path, lora_folder=tmp_path / "Lora"), tmp_path, [sys.executable, "-c", "raise SystemExit(9)"]
    )
    yield service
    service.queue.close()


OUTSIDE = (
    "..", "../up", "/abs", "\\\\server\\share", "\\\\?\\C:\\x", "//server/share", "C:\\x", "C:x", "a/../../b", "~",
    "a:stream", "con", "NUL.txt", "com1", "LPT9.a", "prn", "aux.b.c", "a\0b", "a\nb", "a b", "x" * 101, "a.", ".hidden",
    "-rf", "\u2025", "\uff0e\uff0e", "a\u2215b", "a\uff0fb", "a\u2044b", "con\u00b9", "\u0430dmin", "a\u202egnp.b",
    "a\u200bb", "none",
)  # fmt: skip
"""Names that mean another place, or nothing, on some system; or look like another name."""


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_names_of_other_places(service, name):
    (service.uploads.folder.parent / "a.png").write_bytes(b"x")
    picture = service.uploads.take(service.uploads.folder.parent / "a.png")
    for target in ({"name": name}, {"name": "good", "subfolder": name or "/"}):
        with pytest.raises(UserError):
            service.make([picture], model="mini", **target)
    with pytest.raises(UserError):
        service.lora(name)
    with pytest.raises(UserError):
        service.uploads.paths([name])
    assert not (service.host.lora_folder()).exists()
    assert not [job for job in service.queue.jobs() if job.kind == "make"]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_an_uploaded_file_of_that_name_is_given_a_clean_one(service, tmp_path, name):
    service.host.lora_folder().mkdir()
    job = service.convert(tmp_path / "upload.safetensors", f"{name}.safetensors", "kohya")
    output = Path(job.request["output"])
    assert output.parent == service.host.lora_folder() and check_name(output.stem)
    job = service.export(tmp_path / "upload.safetensors", f"{name}.safetensors", "diffusers", 8)
    output = Path(job.request["output"])
    assert output.parent == service.host.lora_folder().parent / "i2l-training" and check_name(output.name)


@pytest.mark.parametrize(("act", "words"), [("convert", ["--help"]), ("export", ["--help", 8]), ("export", ["diffusers", 0])])  # fmt: skip  # noqa: E501
def test_words_of_a_client_do_not_become_options(service, tmp_path, act, words):
    with pytest.raises(UserError):
        getattr(service, act)(tmp_path / "a.safetensors", "a", *words)


def test_only_models_of_the_catalogue_are_fetched(service):
    service.models._rows = [{"name": "mini"}]
    for name in ("../evil", "someone/weights", "--to"):
        for act in (service.download, service.verify):
            with pytest.raises(UserError):
                act(name)


def test_pictures_that_are_kept_have_a_bound(service, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_KEPT", 250)
    ids = []
    for number in range(4):
        ids.append(service.uploads.take_stream(BytesIO(bytes([number]) * 100)))
        os.utime(service.uploads.folder / ids[-1], (number + 1, number + 1))
    assert [path.name for path in service.uploads.paths(ids[2:])] == ids[2:]
    assert len(list(service.uploads.folder.iterdir())) == 2


def test_a_picture_that_does_not_end(service, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 1 << 20)
    with pytest.raises(UserError):
        service.uploads.take_stream(BytesIO(bytes((1 << 20) + 1)))
    assert not list(service.uploads.folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="links and owners of POSIX")
def test_the_folder_in_temp_is_ours_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("I2L_STATE", raising=False)
    monkeypatch.setattr(queue.process, "ROOT", tmp_path / "nowhere")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder, other = tmp_path / f"i2l-{os.getuid()}", tmp_path / "other"
    other.mkdir()
    folder.symlink_to(other)  # laid by somebody else before our first start
    with pytest.raises(UserError):
        queue.state_folder()
    folder.unlink()
    folder.touch(mode=0o600)
    with pytest.raises(UserError):
        queue.state_folder()
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UserError):
        queue.state_folder()
    folder.rmdir()
    assert queue.state_folder() == folder and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(queue.os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    (tmp_path / f"i2l-{queue.os.getuid()}").mkdir(mode=0o700)
    with pytest.raises(UserError):
        queue.state_folder()


def test_settings_of_folders_are_not_shown_in_the_network(tmp_path):
    import gradio as gr

    from i2l_ext.webui.tab import build_tab

    service = Service(
        StandaloneHost(tmp_path, lora_folder=tmp_path, is_local=False), tmp_path, [sys.executable, "-c", ""]
    )
    with gr.Blocks():
        shown = set(build_tab(service))
    service.queue.close()
    assert {option.key for option in SETTINGS if option.key in shown} == {o.key for o in SETTINGS if not o.folder}


def test_the_credentials_of_the_stand_alone_page(tmp_path, monkeypatch):
    """They stand before the page and before the HTTP interface."""
    monkeypatch.setenv("I2L_STATE", str(tmp_path / "state"))
    engine = [sys.executable, "-c", "raise SystemExit(9)"]
    folder, auth = tmp_path / "Lora", [("me", "secret")]
    blocks, service = standalone.start_page(
        "127.0.0.1", free_port(), lora_folder=folder, command=engine, api=True, auth=auth
    )
    with httpx.Client(base_url=blocks.local_url, timeout=120) as client:
        for path in ("/config", "/i2l/v1/loras", "/i2l/v1/openapi.json"):
            assert client.get(path).status_code == 401, path
            assert client.get(path, auth=("me", "wrong")).status_code == 401, path
        assert client.get("/i2l/v1/loras", auth=("me", "secret")).status_code == 200
    blocks.close()
    service.queue.close()


def test_the_credentials_of_a_webui(monkeypatch, tmp_path):
    """All that the WebUI knows, each of which opens; and the extension puts them before its routes."""
    from i2l_ext.webui import api, extension
    from i2l_ext.webui.hosts.webui import WebUIHost

    users = tmp_path / "users"
    users.write_text("e:f,g:h\n", encoding="utf-8")
    flags = SimpleNamespace(api=True, api_auth="a:b,c:d:e", gradio_auth="u:p", gradio_auth_path=str(users))
    modules = ModuleType("modules")
    modules.shared = SimpleNamespace(cmd_opts=flags)
    modules.paths = SimpleNamespace(script_path=str(tmp_path), models_path=str(tmp_path))
    monkeypatch.setitem(sys.modules, "modules", modules)
    known = [("a", "b"), ("c", "d:e"), ("u", "p"), ("e", "f"), ("g", "h")]
    host = WebUIHost()
    assert host.credentials() == known
    added = []
    monkeypatch.setattr(extension, "webui_service", lambda: SimpleNamespace(host=host))
    monkeypatch.setattr(api, "add_api", lambda app, service, credentials=(): added.extend(credentials))
    app = SimpleNamespace(router=SimpleNamespace(routes=["the host's"]))
    extension._started(None, app)
    assert added == known
    assert [getattr(route, "path", route) for route in app.router.routes] == ["/i2l/alive", "the host's"]


@pytest.mark.parametrize("flags", [{"listen": True}, {"share": True}, {"ngrok": "x"}, {"server_name": "0.0.0.0"}, {}])  # noqa: S104  # fmt: skip
def test_a_webui_in_the_network_is_not_local(monkeypatch, tmp_path, flags):
    from i2l_ext.webui.hosts.webui import WebUIHost

    modules = ModuleType("modules")
    modules.shared = SimpleNamespace(cmd_opts=SimpleNamespace(**flags), opts=SimpleNamespace())
    modules.paths = SimpleNamespace(script_path=str(tmp_path), models_path=str(tmp_path))
    monkeypatch.setitem(sys.modules, "modules", modules)
    assert WebUIHost().is_local is (not flags)
