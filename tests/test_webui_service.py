"""What the tab and the HTTP interface ask for, done by the real engine; and that no folder is told of."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from hubs import FakeHub
from i2l_ext.converters import consumers
from i2l_ext.converters.errors import UserError
from i2l_ext.service.batches import make_groups
from i2l_ext.service.redaction import redact_paths
from i2l_ext.service.service import Service
from i2l_ext.webui import updates
from i2l_ext.webui.hosts.standalone import StandaloneHost
from small_models import SMALL
from test_training_run import TRAINER, as_if_a_trainer_had_it

HERE = Path(__file__).resolve().parent
ENGINE = [sys.executable, str(HERE / "small_engine.py")]


def done(service, job):
    job = service.queue.wait(job.id, 300)
    assert job.state == "done", (job.error, job.tail)
    return job


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def service(place):
    service = Service(StandaloneHost(place / "state", lora_folder=place / "models" / "Lora"), place / "state", ENGINE)
    yield service
    service.queue.close()


@pytest.fixture(scope="module")
def made(service, place):
    picture = place / "picture.png"
    Image.effect_mandelbrot((200, 160), (-2, -1, 1, 1), 20).convert("RGB").save(picture)
    return done(
        service, service.make([service.uploads.take(picture)], name="looked_at", model="mini", subfolder="mine")
    )


def test_what_a_make_tells_has_no_folder_of_this_machine(made, place):
    told = str(made.view())
    assert str(place) not in told and made.result["file"] == "mine/looked_at.safetensors"
    assert "i2l convert mine/looked_at.safetensors --to kohya" in told


def test_the_curve_of_a_lora(service, made):
    kept = done(service, service.rank_curve(service.lora(made.result["file"]), made.result["file"])).result["kept"]
    assert len(kept["all"]) == made.result["rank"] and len(kept) > 2
    for shares in kept.values():
        assert shares == sorted(shares) and 0 < shares[0] < 1 and shares[-1] == 1


@pytest.mark.parametrize("kind", ["made", "inspected"])
def test_a_repair_makes_the_program_load_it(service, made, kind):
    shown = made.result["file"]
    known = made if kind == "made" else done(service, service.inspect(service.lora(shown), shown))
    assert "nothing" in [
        one["status"] for one in known.result["check"]["consumers"] if one["consumer"] == "musubi-tuner"
    ]
    repaired = done(service, service.repair(known.id, "musubi-tuner"))
    assert repaired.result["file"] == f"{repaired.title}.safetensors" and repaired.title.startswith(
        "looked_at-musubi-tuner"
    )
    path = service.host.lora_folder() / repaired.result["file"]
    [verdict] = [one for one in consumers.check(path)[1] if one.consumer.id == "musubi-tuner"]
    assert verdict.status == "all"


def test_a_repair_by_an_export(service, made):
    repaired = done(service, service.repair(made.id, "flymyai"))
    assert repaired.result["folder"] == "i2l-training/looked_at-flymyai"
    assert (service.host.lora_folder().parent / repaired.result["folder"] / repaired.result["run"]).is_file()


def test_what_needs_no_mending(service, made):
    job = service.queue.wait(service.repair(made.id, "forge-neo").id, 300)
    assert job.state == "failed" and job.error.startswith("There is nothing to repair")
    for id in ("", "0" * 16):
        with pytest.raises(UserError):
            service.repair(id, "musubi-tuner")


def test_the_bug_report_is_not_private(service, place):
    text = done(service, service.doctor()).result["text"]
    assert "torch" in text and "stand-alone" in text
    assert str(place) not in text and str(Path.home()) not in text and os.uname().nodename not in text.split()


def test_a_failure_tells_no_folder(service, place):
    bad = place / "models" / "Lora" / "bad.safetensors"
    bad.write_bytes(b"\xff" * 64)
    job = service.queue.wait(service.inspect(bad, "bad.safetensors").id, 300)
    assert job.state == "failed" and "bad.safetensors" in job.error
    assert str(place) not in str(job.view()) and str(HERE) not in str(job.view())
    bad.unlink()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("i2l convert '/srv/my loras/a.safetensors' --to kohya", "i2l convert 'a.safetensors' --to kohya"),
        ("/srv/my loras", ""),
        ("/srv/loras2/my/x", "x"),
        ("File /usr/lib/python3/site.py, line 3", "File site.py, line 3"),
        ("see https://huggingface.co/a/b/c", "see https://huggingface.co/a/b/c"),
        ("2.1 GB / 4.0 GB, 3/4", "2.1 GB / 4.0 GB, 3/4"),
        (r"C:\Users\ann\x.safetensors", "x.safetensors"),
        ("data:image/png;base64,/srv/my loras/a", "data:image/png;base64,/srv/my loras/a"),
        ({"a": ["/srv/my loras/sub/b", 3, None]}, {"a": ["sub/b", 3, None]}),
    ],
)
def test_folders_are_hidden(text, shown):
    assert redact_paths(text, [Path("/srv/my loras"), Path("/")], others=True) == shown


def test_download_and_verify(world, tmp_path, monkeypatch):
    hub = FakeHub()
    for part in SMALL["small"].parts:
        for file in part.files:
            hub.add(part.repo, file, (world.models / part.repo / file).read_bytes())
    monkeypatch.setenv("I2L_TEST_SMALL", "1")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("I2L_MODELS", raising=False)
    host = StandaloneHost(tmp_path / "state", lora_folder=tmp_path / "Lora")
    host.settings_file.write({"i2l_models_folder": str(tmp_path / "weights")})
    service = Service(host, tmp_path / "state", ENGINE)

    def row():
        service.models.rows(refresh=True)
        while service.models._search:
            time.sleep(0.05)
            service.models.rows()
        return next(row for row in service.models.rows() if row["name"] == "small")

    assert not row()["ready"] and row()["download_folder"] == str(tmp_path / "weights")
    with pytest.raises(UserError, match="licences"):
        service.download("small")
    with pytest.raises(UserError, match="no source"):
        service.download("small", "elsewhere", agreed=True)
    assert not [job for job in service.queue.jobs() if job.kind == "download"]
    assert service.models.choose() == "mini"
    job = done(service, service.download("small", agreed=True))
    assert not job.request["packed"]
    files = [
        path.relative_to(tmp_path / "weights").as_posix() for path in (tmp_path / "weights").rglob("*.safetensors")
    ]
    assert row()["ready"] and sorted(job.result["files"]) == sorted(files)
    assert service.models.choose() == "small" and service.models.choose("mini-coarse", "none") == "mini-coarse"
    host.settings_file.write({**host.settings_file.read(), "i2l_model": "mini"})
    assert service.models.choose() == "mini", "the user's setting stands"
    assert service.download("small").state != "failed", "nothing is missing, so there is nothing to agree to"
    found = done(service, service.verify("small")).result["parts"]
    assert [part["id"] for part in found] == [part.id for part in SMALL["small"].parts]
    assert all("checksum" in part["found"] for part in found)
    victim = next((tmp_path / "weights").rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    job = service.queue.wait(service.verify("small").id, 300)
    assert job.state == "failed" and victim.name in job.error and str(tmp_path) not in job.error
    service.queue.close()
    hub.close()


def test_the_page_begins_with_a_model_that_is_downloaded(tmp_path):
    """Also once its download is over; what the user has picked stays."""
    pytest.importorskip("gradio")
    from i2l_ext.webui import tab

    def rows(ready):
        part = {"id": "a", "path": None, "problem": None, "bytes": 1, "licence": "L", "repo": "some/repo"}
        return [
            {"name": name, "arch": name, "line": "", "ready": here, "download_bytes": 1, "download_folder": "/w",
             "parts": [{**part, "repo": part["repo"] if name != "mini" else None, "present": here}]}
            for name, here in (("mini", True), ("first", False), ("second", ready))
        ]  # fmt: skip

    def page(ready, **form):
        service.models._rows = rows(ready)
        return tab.answer_poll(service, {"greeted": True}, json.dumps(form), ["models"])[1:]

    service = Service(StandaloneHost(tmp_path / "state", lora_folder=tmp_path / "Lora"), tmp_path / "state", ENGINE)
    try:
        assert 'value="mini" checked' in page(False, model="mini")[0]
        assert 'value="second" checked' in page(True, model="mini")[0]
        assert 'value="mini" checked' in page(True, model="mini", picked="mini")[0]
        service.host.settings_file.write({"i2l_model": "first"})
        assert 'value="first" checked' in page(True)[0]
        assert page(True)[0].count("&quot;offer&quot;") == 1  # each that is absent offers its own download
    finally:
        service.queue.close()


def test_an_engine_that_cannot_start_is_told_on_the_page(tmp_path):
    """Not "looking" for ever; and who opens the page again, after mending it, need not restart the WebUI."""
    pytest.importorskip("gradio")
    from i2l_ext.webui import tab

    engine = tmp_path / "engine.py"
    engine.write_text("raise SystemExit('no module named torch')")
    service = Service(
        StandaloneHost(tmp_path / "state", lora_folder=tmp_path / "Lora"),
        tmp_path / "state",
        [sys.executable, str(engine)],
    )

    def page(seen):
        seen, models = tab.answer_poll(service, seen, "{}", ["models"])
        return seen, models if isinstance(models, str) else ""

    try:
        seen, shown = page({})
        while not shown:
            time.sleep(0.05)
            seen, shown = page(seen)
        assert 'role="alert"' in shown and "no module named torch" in shown
        jobs = len(service.queue.jobs())
        assert page(seen)[1] == "" and len(service.queue.jobs()) == jobs, "it is not tried again and again"
        engine.write_text("from i2l_ext.worker.main import main\nmain()")
        seen, shown = page({})
        while 'value="mini"' not in shown:
            time.sleep(0.05)
            seen, shown = page(seen)
    finally:
        service.queue.close()


@pytest.fixture(scope="module")
def started(service, made):
    """A start folder, with the picture that made the LoRA."""
    job = done(service, service.export(service.lora(made.result["file"]), made.result["file"], "ai-toolkit", 4))
    as_if_a_trainer_had_it(service.host.lora_folder().parent / job.result["folder"])
    return job


def test_an_export_takes_the_pictures_from_the_uploads(service, started, place):
    folder = service.host.lora_folder().parent / started.result["folder"]
    assert started.result["pictures"] == 1 and str(place) not in str(started.view())
    copy = folder / "pictures" / "1.png"
    assert copy.read_bytes() == (place / "picture.png").read_bytes() and copy.with_suffix(".txt").read_text() == ""


def test_a_training_is_started_watched_and_its_lora_is_in_the_library(service, started, place):
    home = place / "ai toolkit"
    (home / "toolkit").mkdir(parents=True)
    (home / "toolkit/config_modules.py").touch()
    (home / "run.py").write_text(TRAINER)
    (home / "mode").write_text("waits")
    with pytest.raises(UserError, match="in the settings first"):
        service.train(started.id)
    with pytest.raises(UserError, match="no longer known"):
        service.train("0" * 16)
    service.host.settings_file.write({"i2l_trainer": str(home), "i2l_trainer_python": sys.executable})
    service.host.is_local = False
    with pytest.raises(UserError, match="at the machine itself"):
        service.train(started.id)
    service.host.is_local = True
    job = service.train(started.id)
    end = time.monotonic() + 120
    while not job.log.lines and time.monotonic() < end:
        time.sleep(0.1)
    assert service.log_of(job).lines == ("Missing keys: []",) and job.lane == "train"
    page = updates.changes(service, {}, {})
    assert "Missing keys: []" in page["train_activity"] and f'data-i2l-job="{job.id}"' in page["train_activity"]
    service.queue.cancel(job.id)
    assert service.queue.wait(job.id, 20).state == "cancelled"
    assert not service.host.lora_folder().joinpath(f"{job.title}.safetensors").exists()
    (home / "mode").write_text("trains")
    trained = done(service, service.train(started.id))
    assert trained.result["file"] == f"{trained.title}.safetensors" in service.loras()
    assert trained.result["losses"][-1] == [4, 0.25] and str(place) not in str(trained.view())
    page = updates.changes(service, {}, {})
    assert trained.result["file"] in page["train_run"] and "<polyline" in page["train_run"]


def test_a_failed_training_says_the_trainers_last_line(service, started, place):
    (place / "ai toolkit/mode").write_text("fails")
    job = service.queue.wait(service.train(started.id).id, 120)
    assert (job.state, job.code) == ("failed", "trainer_failed")
    assert "ValueError: it went wrong" in job.error and "Missing keys: []" in job.tail


def test_the_key_format_is_the_models_own_unless_somebody_names_one(service, place, made, monkeypatch):
    """By a setting or in the form; there "automatic" counts too. Of groups as of one."""
    asked = []
    monkeypatch.setattr(service, "submit", lambda title, request, **rest: asked.append(request))
    picture = service.uploads.take(place / "picture.png")
    for setting, formats in {"automatic": (None, "kohya"), "webui": (None, "automatic", "kohya")}.items():
        service.host.settings_file.write({"i2l_key_format": setting})
        for key_format in formats:
            service.make([picture], name="said", model="mini", key_format=key_format)
            make_groups(service, [("said", [picture])], model="mini", key_format=key_format)
    service.host.settings_file.write({"i2l_key_format": "automatic"})
    said = [request.key_format for request in asked]
    assert said[::2] == said[1::2] == [None, "kohya", "webui", None, "kohya"]
