"""The tab's parts that need no browser: texts, pages, uploads, the service, and what loading the extension costs."""

import ast
import json
import os
import re
import subprocess
import sys
from html import escape
from math import inf
from pathlib import Path
from types import SimpleNamespace

import pytest

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.trainers import TRAINERS
from i2l_ext.engine.job import Job, Log, Progress
from i2l_ext.engine.queue import Queue
from i2l_ext.library import names
from i2l_ext.service import model_list
from i2l_ext.service.service import DownloadNeeded, Service, checked_weights, tray_pictures
from i2l_ext.service.settings import HUB_TITLES, SETTINGS, SettingsFile
from i2l_ext.service.uploads import Uploads, received
from i2l_ext.webui import actions, html, job_views, markup, model_views, results, updates
from i2l_ext.webui.hosts.standalone import StandaloneHost
from i2l_ext.webui.languages import LANGUAGES, all_words, read_words
from i2l_ext.webui.texts import WORDS, all_texts

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("language", [code for code in LANGUAGES if code != "en"])
def test_every_text_is_translated(language):
    told, texts = read_words(language), set(all_texts())
    assert (texts - set(told), set(told) - texts) == (set(), set()), "missing, too many"
    assert all(told.values())


SAID_ELSEWHERE = {
    "access.py", "api.py", "client_fields.py", "standalone.py", "openapi.py",  # to programs, and on a terminal
    "bases.py", "heads.py", "pack.py", "pack_writer.py", "packed_numbers.py", "packing.py", "lora_folders.py",
    "diffsynth.py", "draw.py",
    "trust.py", "python.py",  # what only a command asks for, or what the tab asks in words of its own
}  # fmt: skip
ROOMS_ELSEWHERE = {"commands", "training", "hooks", "comfyui", "mini", "worker", "branch", "hosts"}
"""Of terminals, nodes, trainers and the prompt's own log."""
SAID_OTHERWISE = (
    "X (at the tensor X)", "X: model files are missing: X; X in all. X", "Leave --alpha out", "--each names",
    "Say where to save", "Give --heads", "does not say how it was made", "i2l models trust",
)  # fmt: skip
"""Texts that join others, and advice for a terminal (see below)."""


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


@pytest.mark.parametrize("language", [code for code in LANGUAGES if code != "en"])
def test_what_is_said_in_the_tab_is_translated(language):
    """Refusals, hints, lines about models, verdicts."""
    from i2l_ext.converters import consumer_table, consumers

    words = all_words()[language]
    patterns = [re.compile(re.escape(key).replace(r"\{\}", ".+?"), re.DOTALL) for key in words if "{}" in key]
    statuses = set(re.findall(r"\w[\w ]*", consumers.Verdict.__doc__.split("status``:")[1].split("``loads``")[0]))
    assert {"all", "part", "nothing", "no model", "untried"} <= statuses
    rooms = [path for room in ("i2l_ext", "converters") for path in (ROOT / room).rglob("*.py")]
    rooms = [
        path
        for path in rooms
        if not {path.name, *path.relative_to(ROOT).parts[1:]} & (SAID_ELSEWHERE | ROOMS_ELSEWHERE)
    ]
    told = [text for path in rooms for text in said(path)]
    told = [text for text in told if text != "X: X." and not any(one in text for one in SAID_OTHERWISE)]
    assert len(told) > 200
    texts = [re.sub(r"\.X$", ".", text).replace(": Xnot", ": not") for text in told]  # an end, or a part, that may lack
    lacking = [text for text in texts if text not in words and not any(one.fullmatch(text) for one in patterns)]
    lacking += {"all", "part", "nothing", "no model", "untried"} - set(words)
    of_programs = {one.not_tried for one in consumer_table.CONSUMERS} | {consumer_table.Consumer.not_tried}
    lacking += of_programs - set(words)
    assert lacking == [], "translate them in i2l_ext/webui/languages/*-phrases.json"


COMMANDS = re.compile(r"(?<![\w-])--?[a-z][a-z-]*\b|(?<![/\w])i2l [a-z]+|pip install|\bpython [\w-]")
NOT_FOR_THE_TAB = {
    "start_folder.py",  # the read-me, for who trains
    "commands",
    "training",
    "hooks",
    "comfyui",
    "mini",
    "requests",
    "trainers",
    "v2_models",
    "standalone.py",
    "export.py",
    "generation.py",
    "inspection.py",
    "consumer_table.py",
    "heads.py",
}
"""Rooms and modules whose advice is for a terminal or stands in a read-me; of v2's code a button of the tab asks."""

NOT_IN_THE_TAB = (
    "in one go: i2l models download",  # packing is asked for in a terminal
    "no model is downloaded, so", "--each names and weighs", "Say where to save", "was made with heads of its own",
    "says its scale itself", "is a folder. Say with -o", "i2l models trust", "for X: i2l check", "a LoRA that i2l has",
    "does not say how it was made. Name", "Test LoRA: only", "python run.py",
)  # fmt: skip
"""Texts that the tab's own requests never bring about, or which it tells in words of its own."""


TYPED_FOR_A_TRAINER = "python X"
"""All of the line for the trainer's terminal, which who trains has."""


def test_the_tab_advises_no_commands():
    """What the rooms below advise somebody at a terminal is told otherwise in the tab, in every language."""
    english = all_words()["en"]
    advised = 0
    for path in [*(ROOT / "i2l_ext").rglob("*.py"), *(ROOT / "converters").rglob("*.py")]:
        below = path.relative_to(ROOT).parts
        if below[:2] == ("i2l_ext", "converters") or NOT_FOR_THE_TAB & set(below):
            continue
        for text in whole_texts(ast.parse(path.read_text("utf-8"))):
            told_so = text == TYPED_FOR_A_TRAINER or any(part in text for part in NOT_IN_THE_TAB)
            if COMMANDS.search(text) and " " in text and not told_so:
                advised += 1
                said = re.compile(re.escape(text).replace("X", ".*"))
                assert any(said.search(key) or key in text for key in english), (
                    f"{path}: {text!r} needs words for the tab"
                )
    assert advised > 15
    for words in all_words().values():
        assert english.keys() <= words.keys()
        told = " ".join(words[key] for key in english)
        assert not re.search(r"--|\bi2l |pip ", told), told
        assert all("i2l draw" not in text for text in WORDS.values())


def whole_texts(tree):
    """The texts of a module, docstrings left out, parts that are joined in one."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = [_plain(node) for node in ast.walk(tree) if id(node) not in inner]
    return [text for text in found if isinstance(text, str)]


@pytest.mark.parametrize("language", [code for code in LANGUAGES if code != "en"])
def test_a_phrase_has_as_many_places_in_every_language(language):
    words = read_words(f"{language}-phrases")
    others = {key for code in LANGUAGES if code not in ("en", language) for key in read_words(f"{code}-phrases")}
    assert (others - set(words), set(words) - others) == (set(), set()), "missing, too many"
    wrong = [key for key, told in words.items() if not told or len(re.findall(r"\{\d*\}", told)) != key.count("{}")]
    assert wrong == []


def test_pages_escape_what_is_not_theirs(tmp_path):
    evil = '<script>"x"</script>'
    job = Job("ab", "make", evil, {}, tmp_path, state="failed", error=evil, hint=evil, tail=[evil])
    running = Job("cd", "make", evil, {}, tmp_path, state="running", started=1.0, progress=Progress(({"title": evil},)))
    page = (
        job_views.activity([running], [job], lambda job: Log(), "make")
        + job_views.overview([running, job], {"cd": "make"})
        + html.tray([{"id": evil, "picture": evil, "weight": 1}], [evil])
    )
    page += model_views.model_choice([{"name": evil, "line": evil, "ready": False, "download_bytes": 1}], evil)
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_download_is_told_as_the_command_line_tells_it():
    from i2l_ext.models import catalogue, download, hubs, listing, store

    row = next(row for row in listing.listing(store.Folders(Path("/srv/weights"))) if row.name == "qwen-image-style")
    for places in (True, False):
        page = model_views.download_offer(row.json(), "make", places=places)
        missing = download.missing(catalogue.MODELS[row.name], store.Folders(Path("/srv/weights")))
        assert len(missing) == 3 and 'type="checkbox" name="agreed" value="qwen-image-style"' in page
        assert 'type="checkbox" name="packed" value="qwen-image-style"' in page
        for part in missing:
            assert part.id in page and part.repo in page and escape(part.licence) in page
            assert markup.format_bytes(part.nbytes) in page
        assert markup.format_bytes(row.download_bytes) in page and (str(Path("/srv/weights")) in page) is places
    mini = model_views.download_offer({**row.json(), "parts": []}, "make", places=True)
    assert "checkbox" not in mini and "fetch" not in mini
    theirs = model_views.download_offer({**row.json(), "has_code": True}, "make", places=True)
    assert 'name="agreed"' in theirs and 'name="packed"' not in theirs, "v2 models have no packed form"
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
    [{"name": "a/b"}, {"name": ""}, {"strength": 0}, {"strength": float("nan")}, {"rank": 0}, {"key_format": "x"},
     {"dtype": "x"}, {"weights": [1, 2]}, {"pictures": []}, {"pictures": ["../x"]}],
)  # fmt: skip
def test_wishes_that_are_refused(service, tmp_path, change):
    (tmp_path / "a").write_bytes(b"one")
    good = {"pictures": [service.uploads.take(tmp_path / "a")], "name": "x", "model": "mini"}
    with pytest.raises(UserError):
        service.make(**{**good, **change})
    assert not [job for job in service.queue.jobs() if job.kind == "make"]


@pytest.mark.parametrize(
    "tray",
    [None, 7, [["x"]], [[1, 1]], [["x", 0]], [["x", True]], [["x", "1"]], [["x", 1]] * 65, [["x", -2]], [["x", None]]],
)
def test_trays_that_are_refused(service, tmp_path, tray):
    """Damaged ones at once; what is out of range by the request and the uploads."""
    (tmp_path / "a").write_bytes(b"one")
    id = service.uploads.take(tmp_path / "a")
    if isinstance(tray, list):
        tray = [[id if one == "x" else one for one in entry] for entry in tray]
    with pytest.raises(UserError):
        pictures, weights = tray_pictures({"pictures": tray})
        service.make(pictures, name="x", model="mini", weights=checked_weights(weights))
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


def test_a_share_that_counts_nothing_is_told_by_its_picture():
    with pytest.raises(UserError, match="The share of picture 2 must be a number greater than 0"):
        checked_weights([1, 0, 2])
    with pytest.raises(UserError, match="pictures 1, 3"):
        checked_weights([-2.0, 1, None])
    shown = html.tray([{"id": "a", "picture": "", "weight": None}, {"id": "b", "picture": "", "weight": 0.0}])
    assert 'value=""' in shown and 'value="0"' in shown  # as they were typed


def test_every_fault_of_a_name_has_words_on_the_page():
    faults = {"character", "scripts", *(key for _, key, _ in names._FAULTS)}
    assert faults == {key.removeprefix("name_") for key in WORDS if key.startswith("name_")} - {"better"}
    with pytest.raises(names.NameRefused) as refused:
        names.check_name("水:彩")
    page = html.name_line(refused.value)
    assert "cannot have this character" in page and "&#x27;:&#x27;" in page and "水-彩" in page


def _ended(service, kind, title, state="done", **more):
    job = Job(
        f"{len(service.queue.jobs()):04x}",
        kind,
        title,
        {},
        Path("x"),
        state=state,
        started=1.0,
        ended=float(len(service.queue.jobs()) + 2),
        **{"created": 0.0, **more},
    )
    service.queue._jobs[job.id] = job
    return job


def test_all_that_a_kill_has_ended_is_told_until_it_is_done_again_or_dismissed(service):
    for kind, title, code in (("make", "one", "cut_off"), ("make", "two", "lost"), ("convert", "three", "lost"),
                              ("make", "four", "lost"), ("make", "five", "unexpected")):  # fmt: skip
        _ended(service, kind, title, "failed", error=f"why {title}", code=code)
    told = updates.changes(service, {}, {})
    assert [title for title in ("one", "two", "four", "five") if f"why {title}" in told["make_activity"]] == [
        "one", "two", "four", "five",
    ]  # fmt: skip
    assert "why three" in told["inspect_activity"]
    _ended(service, "make", "two", result=None, state="cancelled", created=6.5)  # asked for again, and stopped
    again = _ended(service, "make", "five", "failed", error="why again", code="unexpected", created=7.5)
    shown = updates.changes(service, {}, {"dismissed": [service.queue.jobs()[3].id]})["make_activity"]
    assert "why one" in shown and "why two" in shown and again.error in shown
    assert "why four" not in shown and "why five" not in shown
    jobs = service.queue.jobs()
    done = Job("ff", "make", "one", {}, Path("x"), state="done")
    assert [job.title for job in updates._untold([*jobs[:2], done], inf)] == ["two"]
    assert [job.title for job in updates._untold([done, *jobs[:2]], inf)] == ["one", "two"], "it was lost after that"


def test_what_a_job_says_stands_in_the_pane_of_its_button(service):
    _ended(service, "make", "style", "failed", error="why")
    _ended(service, "export", "folder", "failed", error="why not")
    told = updates.changes(service, {}, {})
    assert "why" in told["make_activity"] and "why not" in told["train_activity"]
    assert told["models_activity"] == told["inspect_activity"] == "" and "why" not in told["activity"]
    seen = {}
    updates.changes(service, seen, {})
    dismissed = [job.id for job in service.queue.jobs() if job.kind == "make"]
    assert updates.changes(service, seen, {"dismissed": dismissed})["make_activity"] == ""
    assert "make_activity" not in updates.changes(service, seen, {"dismissed": dismissed})  # nothing is new


def test_a_failure_is_told_until_something_else_is_asked_for(service):
    """Also beside a job that waited behind it and was done since."""
    first, second = (_ended(service, "discard", title, "failed", error=f"{title} lost") for title in ("one", "two"))
    _ended(service, "discard", "three", result={"files": []})
    told = updates.changes(service, {}, {})["library_activity"]
    assert "one lost" in told and "two lost" in told
    assert "one lost" not in updates.changes(service, {}, {"dismissed": [first.id]})["library_activity"]
    _ended(service, "discard", "four", result={"files": []}, created=second.ended + 1)
    assert updates.changes(service, {}, {})["library_activity"] == ""


def test_what_was_made_is_chosen_and_what_was_converted_is_not(service):
    folder = service.host.lora_folder()
    folder.mkdir()

    def add(name, kind, when):
        (folder / name).touch()
        os.utime(folder / name, (when, when))
        result = {
            "file": name,
            "name": name,
            "picture": "",
            "bytes": 1,
            "rank": 1,
            "modules": 1,
            "key_format": "webui",
            "prompt": "",
            "arch": "mini",
            "command": "convert",
        }
        _ended(service, kind, name, result=result)

    add("a.safetensors", "make", 1)
    seen, form = {}, {"name": "b", "subfolder": "sub"}
    assert updates.changes(service, seen, form)["train_file"]["value"] == "a.safetensors"
    add("b.safetensors", "make", 2)
    told = updates.changes(service, seen, form)
    assert told["train_file"]["value"] == told["inspect_file"]["value"] == "b.safetensors"
    assert "sub/b-2.safetensors" in told["saved_as"]  # b is taken now
    add("b-kohya.safetensors", "convert", 3)
    told = updates.changes(service, seen, form)
    assert "value" not in told["train_file"] and "b-kohya.safetensors" in told["train_file"]["choices"][0]


def test_a_model_that_is_absent_is_offered_and_then_waited_for(service, tmp_path, monkeypatch):
    row = {
        "name": "big",
        "ready": False,
        "arch": "qwen-image",
        "line": "",
        "download_bytes": 7,
        "download_folder": str(tmp_path / "not" / "there"),
        "parts": [{"id": "p", "repo": "r", "present": False, "bytes": 7, "licence": "L"}],
    }
    monkeypatch.setattr(service.models, "rows", lambda refresh=False: [row])
    asked = []

    def submit(title, request, **more):
        asked.append(request)
        return service.queue.submit(request.kind, title, {})

    monkeypatch.setattr(service, "submit", submit)
    monkeypatch.setattr(service.queue, "_next", lambda lane: None)
    monkeypatch.setattr("i2l_ext.service.service.MakeRequest.validate", lambda self: None)
    (tmp_path / "a").write_bytes(b"one")
    wish = {"pictures": [service.uploads.take(tmp_path / "a")], "name": "x", "model": "big", "ask": True}
    with pytest.raises(UserError, match="no picture yet"):
        service.make(**{**wish, "pictures": []})  # said before a download is offered
    with pytest.raises(DownloadNeeded):
        service.make(**wish)
    [offer] = actions.offer_download(service, "big", "make", then_make=True).values()
    assert "Download, then make" in offer and "L" in offer
    fetch = {"action": "fetch", "model": "big", "pane": "make", "make": True}
    assert "agree to the licences" in actions.act(service, json.dumps(fetch))["make_error"]
    told = actions.act(service, json.dumps({**fetch, "fields": {"agreed": ["big"], "packed": ["big"]}}))
    assert 'data-i2l-then="i2l_make"' in told["make_offer"] and told["make_error"] == ""
    assert asked[-1].packed
    job = service.make(**wish)
    [download] = service.fetching().values()
    assert updates.pane_of(download, service) == "make"
    with service.queue._changed:
        service.queue._end(download, "cancelled")
    service._on_end(download)
    assert job.state == "cancelled"  # it cannot be made without the model


def test_a_hub_is_offered_where_its_client_is(monkeypatch, tmp_path):
    monkeypatch.setattr(model_list, "ROOT", tmp_path)
    monkeypatch.setattr(model_list, "find_spec", lambda name: None)
    assert model_list.available_hubs() == ["Hugging Face"]
    (tmp_path / ".private" / "site-packages" / "modelscope_hub").mkdir(parents=True)
    assert model_list.available_hubs() == ["Hugging Face", "ModelScope"]


def test_what_is_left_of_a_download_is_resumed(tmp_path):
    row = {
        "name": "big",
        "ready": False,
        "line": "",
        "download_bytes": 100,
        "download_folder": str(tmp_path),
        "parts": [{"id": "p", "repo": "a/b", "present": False, "bytes": 100, "licence": "L"}],
    }
    assert model_list.with_disk(row)["fetched_bytes"] == 0 and "Download" in model_views.readiness(row, (), "make")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / ".model.safetensors.0123.part").write_bytes(b"x" * 30)
    row = model_list.with_disk(row)
    assert row["fetched_bytes"] == 30 and row["free_bytes"] > 0 and "Resume" in model_views.readiness(row, (), "make")
    assert "downloading" in model_views.readiness(row, ("big",), "make")


@pytest.mark.parametrize(("state", "told"), [("failed", "failed"), ("cancelled", "cancelled"), ("done", "waiting")])
def test_what_waits_for_a_download_ends_with_it(service, tmp_path, monkeypatch, state, told):
    monkeypatch.setattr(Queue, "_start_lane", lambda self, lane: None)
    waiting = service.queue.submit("make", "mine", {})
    download = Job("d", "download", "small", {}, tmp_path)
    download.state, download.error, download.code = (
        state,
        "hub did not deliver it: the connection failed.",
        "not_delivered",
    )
    service._after["d"] = [waiting.id]
    service._on_end(download)
    assert waiting.state == told and (waiting.error is None) == (state != "failed")
    shown = str(job_views.failure(download, "make"))
    if state == "failed":
        assert "Not made: the download failed." in str(job_views.failure(waiting, "make"))
        assert "Resume" in shown and "&quot;offer&quot;" in shown and "&quot;small&quot;" in shown


@pytest.mark.parametrize(
    ("arch", "applies", "in_webui", "first"),
    [
        ("z-image", True, True, "&lt;i2l:mine:1&gt;"),
        ("z-image", False, True, "&lt;lora:mine:1&gt;"),
        ("z-image", True, False, "&lt;lora:mine:1&gt;"),
        ("qwen-image", True, True, "&lt;lora:mine:1&gt;"),
    ],
)
def test_the_words_that_the_authors_advise_come_first(arch, applies, in_webui, first, tmp_path):
    job = Job("ab", "make", "mine", {}, tmp_path)
    job.result = {"prompt": "<lora:mine:1>", "arch": arch}
    host = SimpleNamespace(applies_loras=applies, settings_file=None if in_webui else "settings.json")
    shown = str(results._prompt(job, host))
    texts = re.findall(r"<code[^>]*>(.*?)</code>", shown)
    assert texts[0] == first and len(texts) == (2 if first.startswith("&lt;i2l") else 1)
    assert shown.count("txt2img") == 2 * len(texts) * in_webui


def test_an_error_names_the_picture_and_not_its_hash(service, tmp_path):
    pictures = []
    for text in ("one", "two"):
        (tmp_path / text).write_text(text)
        pictures.append(service.uploads.take(tmp_path / text))
    job = Job("ab", "make", "x", {"request": {"pictures": [str(p) for p in service.uploads.paths(pictures)]}}, tmp_path)
    job.error, job.tail = f"{pictures[1]}: no picture", [str(service.uploads.folder / pictures[0])]
    service._redact(job)
    assert (job.error, job.tail) == ("picture 2: no picture", ["picture 1"])


def test_the_last_second_is_no_estimate(tmp_path):
    job = Job("ab", "make", "x", {}, tmp_path, state="running", started=1.0)
    job.progress = Progress(({"id": "decode", "title": "decode"},), past=((0.0, 0.0), (10.0, 0.99)))
    assert WORDS["left"] not in job_views.activity([job], [], lambda job: Log(), "make")
    job.progress = Progress(({"id": "decode", "title": "decode"},), past=((0.0, 0.0), (10.0, 0.5)))
    assert WORDS["left"] in job_views.activity([job], [], lambda job: Log(), "make")


CHECK = {"caution": None, "consumers": [
    {"title": "Forge Neo", "consumer": "forge-neo", "status": "all", "detail": ""},
    {"title": "musubi-tuner", "consumer": "musubi-tuner", "status": "nothing", "detail": "", "repair": "i2l convert x"},
    {"title": "AUTOMATIC1111", "consumer": "a1111", "status": "no model", "detail": "it has none"},
]}  # fmt: skip


def test_who_loads_a_lora_is_one_line_with_the_table_behind_it():
    page = results._loaders(CHECK, "qwen-image", "ab", "make")
    line = page[: page.index("</summary>")]
    for titles, verdict in (("Forge Neo", "yes"), ("musubi-tuner", "after conversion"), ("AUTOMATIC1111", "no")):
        assert f'{titles}</span>: <span class="i2l-word">{verdict}<' in line
    assert "<table>" in page and "Repair for" in page and "i2l convert" not in page
    mini = results._loaders({**CHECK, "caution": "only `i2l draw`"}, "mini", "ab", "make")
    assert "Forge Neo" not in mini and "i2l draw" not in mini


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_starts_a_training(service, tmp_path, trainer):
    result = {"folder": "i2l-training/x", "run": "train.py", "trainer": trainer, "kept": {"all": 1.0}}
    page = results.show_export(Job("ab", "export", "x", {}, tmp_path, result=result), service.host)
    assert str(tmp_path / "i2l-training" / "x") in page  # the whole path, to be copied, on this machine's own page
    assert f"python {tmp_path}/i2l-training/x/train.py" in page
    service.host.is_local = False
    assert str(tmp_path) not in results.show_export(Job("ab", "export", "x", {}, tmp_path, result=result), service.host)


def test_a_start_folder_tells_its_pictures_and_its_base(service, tmp_path):
    result = {"folder": "i2l-training/x", "run": "train.py", "trainer": "musubi-tuner", "kept": {"all": 1.0}}
    job = Job("ab", "export", "x", {}, tmp_path, result=result)
    page = results.show_export(job, service.host)
    for key in ("no_training_pictures", "base_to_fill_in", "run_settings"):
        assert escape(WORDS[key]) in page
    job.result |= {"pictures": 3, "caption": "my <word>", "bases": {"vae": "VAE/ae.safetensors"}}
    page = results.show_export(job, service.host)
    assert "my &lt;word&gt;" in page and "VAE/ae.safetensors" in page and WORDS["start_run"] not in page
    assert WORDS["mini_starts"] not in page
    job.result |= {"caution": "A LoRA of the test model."}
    assert WORDS["mini_starts"] in results.show_export(job, service.host)
