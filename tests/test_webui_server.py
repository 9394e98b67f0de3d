"""The server behind the tab and the HTTP interface: many threads, disks that fail, what is looked up how often."""

import errno
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from i2l_ext.converters.errors import UserError
from i2l_ext.engine import queue
from i2l_ext.library import folder as library
from i2l_ext.service import uploads
from i2l_ext.service.model_list import ModelList
from i2l_ext.service.service import Service
from i2l_ext.service.settings import SETTINGS, SettingsFile
from i2l_ext.service.short_cache import ShortCache
from i2l_ext.service.uploads import Uploads
from i2l_ext.webui.hosts.standalone import StandaloneHost

MANY = 12


def at_once(function, count=MANY):
    """What ``function(number)`` gives in so many threads, all started in the same moment."""
    start = threading.Barrier(count)

    def run(number):
        start.wait()
        return function(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Its jobs wait for ever: no lane is started."""
    monkeypatch.setattr(queue.Queue, "_run_lane", lambda queue, lane: None)
    service = Service(
        StandaloneHost(tmp_path, lora_folder=tmp_path / "Lora"), tmp_path, [sys.executable, "-c", "raise SystemExit(9)"]
    )
    service.host.lora_folder().mkdir()
    yield service
    service.queue.close()


def slowly(monkeypatch, place, name):
    """Let every thread get to the same line."""
    function = getattr(place, name)

    def slow(*values, **named):
        found = function(*values, **named)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(place, name, slow)


def end(job, result=None, error=None):
    job.result, job.error, job.state = result, error, "failed" if error else "done"


# --- many threads -------------------------------------------------------------------------------------------------


def test_models_are_looked_for_once_by_however_many(service, monkeypatch):
    slowly(monkeypatch, service.queue, "submit")
    assert at_once(lambda number: service.models.rows()) == [None] * MANY
    [job] = service.queue.jobs()
    rows = [{"name": "mini"}]

    class Slow(queue.Job):
        @property
        def state(self):
            time.sleep(0.01)  # between the look at it and its use
            return self.__dict__["state"]

        @state.setter
        def state(self, value):
            self.__dict__["state"] = value

    job.__class__ = Slow
    end(job, rows)
    assert at_once(lambda number: service.models.rows()) == [rows] * MANY
    assert len(service.queue.jobs()) == 1


def test_a_search_that_began_before_a_change_is_followed_by_another(service):
    service.models.rows()
    [first] = service.queue.jobs()
    service.models.rows(refresh=True)  # a download has ended while it was under way
    end(first, [])
    service.models.rows()
    assert len(service.queue.jobs()) == 2
    end(service.queue.jobs()[1], [{"name": "mini"}])
    assert [service.models.rows() for _ in range(3)][-1] == [{"name": "mini"}] and len(service.queue.jobs()) == 2


def test_a_full_queue_does_not_keep_the_page_from_its_answer(service, monkeypatch):
    monkeypatch.setattr(queue, "MAX_WAITING", 0)
    assert service.models.rows() is None
    monkeypatch.undo()
    service.models.rows()
    assert len(service.queue.jobs()) == 1


def test_no_two_jobs_are_promised_the_same_name(service, tmp_path, monkeypatch):
    picture = service.uploads.take(_picture(tmp_path))
    slowly(monkeypatch, library, "names_below")
    lora = service.host.lora_folder() / "style.safetensors"
    made = at_once(lambda number: service.make([picture], name="Style", model="mini"), 6)
    assert sorted(job.title for job in made) == ["Style", *(f"Style-{number}" for number in range(2, 7))]
    assert {job.request["name"] for job in made} == {job.title for job in made}
    assert service.targets.likely_name("STYLE") == "STYLE-7"
    converted = at_once(lambda number: service.convert(lora, lora.name, "kohya"), 6)
    assert len({job.request["output"] for job in converted}) == 6
    lora.touch()
    inspected = service.inspect(lora, lora.name)
    repaired = at_once(lambda number: service.repair(inspected.id, "kohya"), 2)
    assert len({job.request["output"] for job in repaired}) == len({job.request["folder"] for job in repaired}) == 2


def test_no_two_jobs_are_promised_the_same_folder(service, monkeypatch):
    slowly(monkeypatch, service.targets, "start_folder")
    lora = service.host.lora_folder() / "style.safetensors"
    targets = [job.request["output"] for job in at_once(lambda n: service.export(lora, lora.name, "diffusers", 4), 6)]
    assert len(set(targets)) == 6


def test_settings_of_several_pages_do_not_undo_each_other(tmp_path, monkeypatch):
    stored = SettingsFile(tmp_path / "settings.json")
    values = {"i2l_device": "cpu", "i2l_memory": "6GB", "i2l_model": "mini", "i2l_dtype": "bf16", "i2l_subfolder": "a"}
    keys = list(values)
    slowly(monkeypatch, stored, "read")
    at_once(lambda number: stored.write({keys[number]: values[keys[number]]}), len(keys))
    held = stored.read()
    assert {key: held[key] for key in keys} == values
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_the_trouble_may_be_over_while_a_page_is_answered(service):
    pytest.importorskip("gradio")
    from i2l_ext.webui import tab

    class Fleeting(ModelList):
        left = 2

        @property
        def failed(self):
            self.left -= 1
            return self._failed if self.left >= 0 else None

        @failed.setter
        def failed(self, job):
            self._failed = job

    trouble = service.queue.submit("models", "", {})
    end(trouble, error="no engine")
    models = service.models
    del models.failed
    models.__class__, models._failed, models._search = Fleeting, trouble, service.queue.submit("models", "", {})
    _, shown = tab.answer_poll(service, {}, "{}", ["models"])
    assert "no engine" in shown


def _picture(folder, name="a.png", colour="red"):
    from PIL import Image

    Image.new("RGB", (64, 64), colour).save(folder / name)
    return folder / name


# --- what is looked up how often ----------------------------------------------------------------------------------


@pytest.fixture
def walks(monkeypatch):
    """Folders from which a walk began."""
    begun = []
    walk = library.os.walk
    monkeypatch.setattr(library.os, "walk", lambda folder, **options: begun.append(folder) or walk(folder, **options))
    return begun


def test_typing_a_name_walks_the_folder_once(service, walks, monkeypatch):
    text = "a_rather_long_name"
    for length in range(1, len(text) + 1):
        assert service.targets.likely_name(text[:length]) == text[:length]
    assert len(walks) == 1
    at_once(lambda number: service.targets.likely_name(f"name{number}"))
    assert len(walks) == 1


def test_what_is_promised_is_looked_up_then(service, walks, tmp_path):
    assert service.targets.likely_name("style") == "style"
    (service.host.lora_folder() / "style.safetensors").touch()
    job = service.make([service.uploads.take(_picture(tmp_path))], name="style", model="mini")
    assert job.title == "style-2" and len(walks) == 2
    assert service.targets.likely_name("style-2") == "style-2-2"
    end(job, {})
    service._on_end(job)
    assert service.targets.likely_name("style") == "style-2" and len(walks) == 3


def test_a_moment_ends(monkeypatch):
    now, looked = [0.0], []
    monkeypatch.setattr("i2l_ext.service.short_cache.time.monotonic", lambda: now[0])
    cached = ShortCache(lambda key: looked.append(key) or len(looked), 5)
    assert [cached("a"), cached("a"), cached("b")] == [1, 1, 2]
    now[0] = 6
    assert cached("b") == 3
    cached.clear()
    assert cached("b") == 4


# --- previews -----------------------------------------------------------------------------------------------------


@pytest.fixture
def looking(tmp_path):
    """A service whose engine looks; and the pictures that it was shown, a list for each time it was started."""
    service = Service(
        StandaloneHost(tmp_path, lora_folder=tmp_path / "Lora"), tmp_path, [sys.executable, "-m", "i2l_ext.worker.main"]
    )
    yield (
        service,
        lambda: [
            [Path(path).name for path in job.request["pictures"]] for job in service.queue.jobs() if job.kind == "look"
        ],
    )
    service.queue.close()


def test_only_new_pictures_are_looked_at(looking, tmp_path):
    service, shown = looking
    red, green, blue = (service.uploads.take(_picture(tmp_path, colour=colour)) for colour in ("red", "green", "blue"))
    (tmp_path / "text").write_text("not a picture")
    bad = service.uploads.take(tmp_path / "text")
    first = service.preview([red, green])
    again = service.preview([green, red, bad, blue])
    assert shown() == [[red, green], [bad, blue]]
    assert [again[1], again[0]] == first and again[2]["error"].startswith("picture 3: ")
    assert service.preview([blue, red, green]) == [again[3], *first]
    assert len(shown()) == 2, "of pictures that are known nothing is started"
    assert service.preview([bad])[0]["error"].startswith("picture 1: "), (
        "what cannot be used may be repaired by an update"
    )


def test_a_damaged_preview_is_made_again(looking, tmp_path):
    service, shown = looking
    red = service.uploads.take(_picture(tmp_path))
    seen = service.preview([red])
    for damaged in (b"", b"\xff", b'"><script>', b"data:text/html,x"):
        (service.uploads.folder / f"{red}.preview").write_bytes(damaged)
        assert service.preview([red]) == seen
    assert len(shown()) == 5


def test_a_preview_goes_with_its_picture(tmp_path, monkeypatch):
    kept = Uploads(tmp_path / "uploads")
    ids = []
    for number in range(4):
        (tmp_path / "a").write_bytes(bytes([number]) * 100)
        ids.append(kept.take(tmp_path / "a"))
        kept.keep_preview(ids[-1], {"p": "A" * 41})
        kept.keep_preview(ids[-1], {"p": "A" * 41}, "0,0,9")
        os.utime(kept.folder / ids[-1], (number, number))
    monkeypatch.setattr(uploads, "MAX_KEPT", 500)  # the new one and two of them, with previews of 100 bytes each
    (tmp_path / "a").write_bytes(b"new")
    new = kept.take(tmp_path / "a")
    assert {path.name for path in kept.folder.iterdir()} == {
        new, *ids[2:], *(f"{id}{end}" for id in ids[2:] for end in (".preview", "@0,0,9.preview"))
    }  # fmt: skip
    kept.sweep()
    assert [path.name for path in kept.folder.iterdir()] == [new]


def test_a_look_that_takes_too_long_is_stopped(service, tmp_path, monkeypatch):
    monkeypatch.setattr("i2l_ext.service.previews.TIMEOUT", 0.05)
    with pytest.raises(UserError, match="too long"):
        service.preview([service.uploads.take(_picture(tmp_path))])
    assert [job.state for job in service.queue.jobs()] == ["cancelled"]


# --- disks that fail ----------------------------------------------------------------------------------------------

FAULTS = {"full": (errno.ENOSPC, 507), "quota": (errno.EDQUOT, 507), "read-only": (errno.EROFS, 500),
          "not allowed": (errno.EACCES, 500), "broken": (errno.EIO, 500)}  # fmt: skip


def refusing(monkeypatch, place, name, code, when=lambda *values: True):
    """Let a call fail as the system lets it fail."""
    function = getattr(place, name)

    def fail(*values, **named):
        if when(*values):
            raise OSError(code, os.strerror(code), "/secret/place")
        return function(*values, **named)

    monkeypatch.setattr(place, name, fail)


@pytest.fixture
def client(service):
    pytest.importorskip("httpx")
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    from i2l_ext.webui import api

    app = Starlette()
    api.add_api(app, service)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def told(answer, status):
    assert answer.status_code == status, answer.text
    [(key, line)] = answer.json().items()
    assert key == "error" and "\n" not in line and "try again" in line and "secret" not in line
    assert ("the disk is full" in line) == (status == 507)


def send(client, picture):
    return client.post("/i2l/v1/loras", files={"pictures": picture.read_bytes()}, data={"name": "x", "model": "mini"})


@pytest.mark.parametrize(("code", "status"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("step", ["mkdir", "open", "replace"])
def test_an_upload_that_cannot_be_kept(client, service, tmp_path, monkeypatch, code, status, step):
    picture = _picture(tmp_path)
    refusing(monkeypatch, Path, step, code, lambda path, *values: service.uploads.folder in (path, path.parent))
    told(send(client, picture), status)
    monkeypatch.undo()
    assert not service.uploads.folder.exists() or not list(service.uploads.folder.iterdir())
    assert not [job for job in service.queue.jobs() if job.kind == "make"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_full_in_the_middle_of_an_upload(client, service, tmp_path, monkeypatch):
    open_ = Path.open

    def full(path, *values, **named):
        stream = open_(path, *values, **named)
        if path.suffix != ".part":
            return stream
        stream.close()
        return open_(Path("/dev/full"), "wb", 0)

    monkeypatch.setattr(Path, "open", full)
    told(send(client, _picture(tmp_path)), 507)
    with pytest.raises(UserError, match="full") as refused:
        service.uploads.take(tmp_path / "a.png")
    assert refused.value.code == "disk_full"
    monkeypatch.undo()
    assert not list(service.uploads.folder.iterdir())


def test_a_form_that_does_not_fit_into_the_temporary_folder(client, tmp_path, monkeypatch):
    import starlette.formparsers

    refusing(monkeypatch, starlette.formparsers, "SpooledTemporaryFile", errno.ENOSPC)
    told(send(client, _picture(tmp_path)), 507)


@pytest.mark.parametrize(("code", "status"), FAULTS.values(), ids=FAULTS)
def test_routes_that_read_what_cannot_be_read(client, service, tmp_path, monkeypatch, code, status):
    (service.host.lora_folder() / "a.safetensors").touch()
    refusing(monkeypatch, Path, "exists", code, lambda path: "i2l-training" in path.parts)
    told(client.post("/i2l/v1/export", json={"lora": "a.safetensors", "trainer": "diffusers", "rank": 4}), status)
    refusing(monkeypatch, Path, "is_file", code, lambda path: path.parent == service.uploads.folder)
    told(send(client, _picture(tmp_path)), status)


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(service, monkeypatch):
    for name in ("a", "b", "c"):
        (service.host.lora_folder() / name).mkdir()
        (service.host.lora_folder() / name / "x.safetensors").touch()
    refusing(monkeypatch, os, "scandir", errno.EIO, lambda path: str(path).endswith("/b"))
    assert sorted(service.loras()) == ["a/x.safetensors", "c/x.safetensors"]


def test_a_subfolder_that_is_a_link_in_a_ring(client, service, tmp_path):
    (service.host.lora_folder() / "ring").symlink_to(service.host.lora_folder() / "ring")
    answer = client.post(
        "/i2l/v1/loras", files={"pictures": b"x"}, data={"name": "x", "model": "mini", "subfolder": "ring"}
    )
    assert answer.status_code == 422 and "ring" in answer.json()["error"]


@pytest.fixture
def handlers(service, monkeypatch):
    """What the tab binds, by the name of the function."""
    gr = pytest.importorskip("gradio")
    from i2l_ext.webui import gradio_versions, tab

    bound = {}
    on = lambda event, function, inputs, outputs: bound.setdefault(function.__name__, function)  # noqa: E731
    monkeypatch.setattr(gradio_versions, "on", on)
    with gr.Blocks():
        tab.build_tab(service)
    return bound


@pytest.mark.parametrize("code", [code for code, _ in FAULTS.values()], ids=FAULTS)
def test_the_tab_tells_of_the_disk_in_one_line(service, handlers, tmp_path, monkeypatch, code):
    from i2l_ext.webui.page_form import answer_errors

    request = SimpleNamespace(headers={"host": "localhost"})
    uploaded = tmp_path / "gradio" / "a.png"
    uploaded.parent.mkdir()
    _picture(uploaded.parent)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploaded.parent))
    refusing(monkeypatch, Path, "open", code, lambda path, *values: path.suffix == ".part")
    refusing(monkeypatch, Path, "exists", code, lambda path: "i2l-training" in path.parts)
    refusing(monkeypatch, Path, "is_dir", code, lambda path: path.name == "locked")
    refusing(monkeypatch, library, "names_below", code)
    (service.host.lora_folder() / "a.safetensors").touch()
    monkeypatch.setattr(service.targets._names, "_find", library.names_below)
    values = [option.default for option in SETTINGS]
    values[1] = str(tmp_path)
    answers = {
        "drop": handlers["drop"](json.dumps({"paths": [str(uploaded)]}), "{}"),
        "add_folder": handlers["add_folder"](request, str(uploaded.parent), "{}"),
        "a folder": handlers["add_folder"](request, str(tmp_path / "locked"), "{}"),
        "saved_as": handlers["saved_as"]("name", ""),
        "keep": handlers["keep"](request, *values),
        "convert": answer_errors(service.convert)(tmp_path / "a", "a", "kohya"),
    }
    for name, answer in answers.items():
        assert 'role="alert"' in answer and "secret" not in answer, (name, answer)
        assert ("the disk is full" in answer) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".part", ".json")] == []


def test_every_output_gets_an_update_of_its_own(service, handlers):
    """gradio takes the values out of an update when it has used it."""
    from i2l_ext.webui import updates

    service.host.settings_file.write({"i2l_subfolder": "mine"})
    told = updates.changes(service, {}, {})
    given = [update for update in [*told.values(), *handlers["reload_list"]()] if isinstance(update, dict)]
    assert len({id(update) for update in given}) == len(given)
    assert told["subfolder"]["value"] == told["i2l_subfolder"]["value"] == "mine"
