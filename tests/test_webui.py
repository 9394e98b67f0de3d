"""The tab's parts that need no browser: texts, pages, uploads, the service, and what loading the extension costs."""

import ast
import os
import re
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.job import Job, Progress
from i2l_ext.service.service import Service, tray_pictures
from i2l_ext.service.settings import HUB_TITLES, SETTINGS, SettingsFile
from i2l_ext.service.uploads import Uploads, received
from i2l_ext.webui import html, markup
from i2l_ext.webui.hosts.standalone import StandaloneHost
from i2l_ext.webui.languages import all_words, read_words
from i2l_ext.webui.texts import all_texts

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("language", ["zh_CN", "ru_RU"])
def test_every_text_is_translated(language):
    told = read_words(language)
    assert set(told) == set(all_texts())
    assert all(told.values())


SAID_IN_THE_TAB = ["images.py", "engine/failures.py", "engine/records.py", "models/catalogue.py", "library/folder.py"]
SAID_ELSEWHERE = {"access.py", "api.py", "client_fields.py", "standalone.py", "openapi.py"}
"""Of webui/: to programs, and on a terminal."""


def said(path):
    """What a module says to people: (its line, the text with X for what stands in it)."""
    from i2l_ext.engine.failures import HINTS
    from i2l_ext.models.catalogue import MODELS

    if path.name == "failures.py":
        return list(HINTS.values())
    if path.name == "catalogue.py":
        return [model.line for model in MODELS.values()]
    calls = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call))
    errors = [call.args[0] for call in calls if getattr(call.func, "id", "") == "UserError" and call.args]
    return [text for text in map(_plain, errors) if text]


def _plain(node):
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
    return None


@pytest.mark.parametrize("language", ["zh_CN", "ru_RU"])
def test_what_is_said_in_the_tab_is_translated(language):
    """Refusals, hints, lines about models, verdicts."""
    from i2l_ext.converters import consumers

    words = all_words()[language]
    patterns = [re.compile(re.escape(key).replace(r"\{\}", ".+?"), re.DOTALL) for key in words if "{}" in key]
    statuses = set(re.findall(r"\w[\w ]*", consumers.Verdict.__doc__.split("status``:")[1].split("``loads``")[0]))
    assert {"all", "part", "nothing", "no model", "untried"} <= statuses & set(words)
    rooms = [*(ROOT / "i2l_ext" / "webui").glob("*.py"), *(ROOT / "i2l_ext" / name for name in SAID_IN_THE_TAB)]
    told = [text for path in rooms if path.name not in SAID_ELSEWHERE for text in said(path)]
    assert len(told) > 40
    texts = [re.sub(r"\.X$", ".", text).replace(": Xnot", ": not") for text in told]  # an end, or a part, that may lack
    lacking = [text for text in texts if text not in words and not any(one.fullmatch(text) for one in patterns)]
    assert lacking == [], "translate them in i2l_ext/webui/languages/*-phrases.json"


def test_a_phrase_has_as_many_places_in_every_language():
    chinese, russian = (read_words(f"{code}-phrases") for code in ("zh_CN", "ru_RU"))
    assert list(chinese) == list(russian)
    for key in chinese:
        for told in (chinese[key], russian[key]):
            assert told and len(re.findall(r"\{\d*\}", told)) == key.count("{}"), key


def test_pages_escape_what_is_not_theirs(tmp_path):
    evil = '<script>"x"</script>'
    job = Job("ab", "make", evil, {}, tmp_path, state="failed", error=evil, hint=evil, tail=[evil])
    running = Job("cd", "make", evil, {}, tmp_path, state="running", started=1.0, progress=Progress(({"title": evil},)))
    page = html.activity([running], job) + html.tray([{"id": evil, "picture": evil, "weight": 1}], [evil])
    page += html.model_choice([{"name": evil, "line": evil, "ready": False, "download_bytes": 1}], evil)
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_download_is_told_as_the_command_line_tells_it():
    from i2l_ext.models import catalogue, download, hubs, store

    row = next(row for row in store.listing(store.Folders(Path("/srv/weights"))) if row.name == "qwen-image-style")
    for places in (True, False):
        page = html.download_facts(row.json(), places=places)
        missing = download.missing(catalogue.MODELS[row.name], store.Folders(Path("/srv/weights")))
        assert len(missing) == 3 and 'type="checkbox" name="i2l_agreed" value="qwen-image-style"' in page
        for part in missing:
            assert part.id in page and part.repo in page and escape(part.licence) in page
            assert markup.format_bytes(part.nbytes) in page
        assert markup.format_bytes(row.download_bytes) in page and (str(Path("/srv/weights")) in page) is places
    mini = html.download_facts({**row.json(), "parts": []}, places=True)
    assert "checkbox" not in mini and "/srv/weights" in mini
    assert list(HUB_TITLES.values()) == list(hubs.HUBS)


@pytest.mark.parametrize("setting", ["", "set"])
def test_downloads_of_the_tab_and_of_the_command_line_go_to_one_folder(service, tmp_path, monkeypatch, setting):
    """Unless the tab's own setting says otherwise."""
    from i2l_ext.models.store import Folders

    service.host.settings_file.write({"i2l_models_folder": setting and str(tmp_path / setting)})
    for named in ("", str(tmp_path / "a"), os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")])):
        monkeypatch.setenv("I2L_MODELS", named)
        line = Folders.default().own
        monkeypatch.setenv("I2L_MODELS", service._environment().get("I2L_MODELS", named))
        assert Folders.default().own == (tmp_path / setting if setting else line)
        assert {*map(Path, filter(None, named.split(os.pathsep)))} <= {Folders.default().own, *Folders.default().webui}


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (65, "1:05"), (3600, "1:00:00"), (59.6, "1:00")])
def test_durations(seconds, shown):
    assert markup.format_seconds(seconds) == shown


def test_only_uploads_are_received(tmp_path):
    folder, outside = tmp_path / "gradio", tmp_path / "secret"
    folder.mkdir()
    outside.write_text("x")
    good = folder / "a.png"
    good.write_text("x")
    (folder / "link.png").symlink_to(outside)
    assert received([str(good)], [folder]) == [good.resolve()]
    (folder / "ring.png").symlink_to(folder / "ring.png")
    wrong = (outside, folder / ".." / "secret", folder / "link.png", folder / "ring.png", folder)
    for name in (*map(str, wrong), "a.png", "/x\0y", f"{folder}/\ud800"):
        with pytest.raises(UserError):
            received([name], [folder])


def test_uploads_are_known_by_their_hash_alone(tmp_path):
    uploads = Uploads(tmp_path / "uploads")
    (tmp_path / "a").write_bytes(b"one")
    id = uploads.take(tmp_path / "a")
    assert uploads.take(tmp_path / "a") == id and [p.read_bytes() for p in uploads.paths([id])] == [b"one"]
    for bad in ("../a", "a" * 64, "", None, 7, f"{id}/../{id}", id.upper()):
        with pytest.raises(UserError):
            uploads.paths([bad])
    with pytest.raises(UserError):
        uploads.paths([id] * 65)
    (tmp_path / "empty").touch()
    with pytest.raises(UserError):
        uploads.take(tmp_path / "empty")
    assert len(list(uploads.folder.iterdir())) == 1


@pytest.fixture
def service(tmp_path):
    service = Service(
        StandaloneHost(tmp_path, lora_folder=tmp_path / "Lora"), tmp_path, [sys.executable, "-c", "raise SystemExit(9)"]
    )
    yield service
    service.queue.close()


@pytest.mark.parametrize(
    "folder", ["../up", "/abs", "\\\\server\\share", "C:\\x", "a/../../b", "con", "a/b/c/d/e", "~x"]
)
def test_subfolders_stay_inside(service, folder):
    with pytest.raises(UserError):
        service.targets.folder(folder)


def test_a_subfolder_that_is_a_link_outside(service, tmp_path):
    (tmp_path / "Lora").mkdir()
    (tmp_path / "Lora" / "out").symlink_to(tmp_path)
    with pytest.raises(UserError):
        service.targets.folder("out")
    assert service.targets.folder("styles/mine") == tmp_path / "Lora" / "styles" / "mine"


@pytest.mark.parametrize(
    "change",
    [{"name": "a/b"}, {"name": ""}, {"strength": 0}, {"strength": float("nan")}, {"rank": 0}, {"dialect": "x"},
     {"dtype": "x"}, {"weights": [1, 2]}, {"pictures": []}, {"pictures": ["../x"]}],
)  # fmt: skip
def test_wishes_that_are_refused(service, tmp_path, change):
    (tmp_path / "a").write_bytes(b"one")
    good = {"pictures": [service.uploads.take(tmp_path / "a")], "name": "x", "model": "mini"}
    with pytest.raises(UserError):
        service.make(**{**good, **change})
    assert not [job for job in service.queue.jobs() if job.kind == "make"]


@pytest.mark.parametrize("tray", [None, 7, [["x"]], [[1, 1]], [["x", 0]], [["x", True]], [["x", "1"]], [["x", 1]] * 65])
def test_trays_that_are_refused(service, tmp_path, tray):
    """Damaged ones at once; what is out of range by the request and the uploads."""
    (tmp_path / "a").write_bytes(b"one")
    id = service.uploads.take(tmp_path / "a")
    if isinstance(tray, list):
        tray = [[id if one == "x" else one for one in entry] for entry in tray]
    with pytest.raises(UserError):
        pictures, weights = tray_pictures({"pictures": tray})
        service.make(pictures, name="x", model="mini", weights=tuple(weights))
    assert not [job for job in service.queue.jobs() if job.kind == "make"]


def test_loras_are_asked_for_by_the_name_in_the_list(service, tmp_path):
    (tmp_path / "Lora" / "sub").mkdir(parents=True)
    (tmp_path / "Lora" / "sub" / "a.safetensors").touch()
    (tmp_path / "b.safetensors").touch()
    assert service.lora("sub/a.safetensors") == tmp_path / "Lora" / "sub" / "a.safetensors"
    for name in ("../b.safetensors", str(tmp_path / "b.safetensors"), "a.safetensors", ""):
        with pytest.raises(UserError):
            service.lora(name)


def test_settings_that_are_not_sound_are_the_defaults(tmp_path):
    stored = SettingsFile(tmp_path / "settings.json")
    defaults = {option.key: option.default for option in SETTINGS}
    assert stored.read() == defaults
    for held in ("[]", "{half", '{"i2l_device": 7, "i2l_cache_gb": -1, "i2l_free_vram": "yes", "other": 1}'):
        stored.path.write_text(held)
        assert stored.read() == defaults
    stored.write({**defaults, "i2l_device": "cpu"})
    assert stored.read()["i2l_device"] == "cpu"


def test_the_webui_process_stays_light():
    code = "import sys, i2l_ext.webui.extension, i2l_ext.service.service, i2l_ext.webui.html; print(*sorted(" \
           "{m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'numpy', 'PIL', 'safetensors'}))"  # fmt: skip  # noqa: E501
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == ""


def test_only_the_hosts_own_files_touch_the_webui():
    import re

    for path in (ROOT / "i2l_ext").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        touches = re.search(r"^\s*(from|import) modules\b", text, re.MULTILINE)
        assert not touches or path.parent == ROOT / "i2l_ext" / "webui" / "hosts", path
