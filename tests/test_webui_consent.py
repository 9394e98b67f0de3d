"""The code of v2 models in the tab: shown, agreed to by a person on the page alone, run."""

import json
import re
import sys
import time

import pytest
import torch

gr = pytest.importorskip("gradio")

from PIL import Image  # noqa: E402

import template_world  # noqa: E402
from i2l_ext.converters import Lora, inspect  # noqa: E402
from i2l_ext.models import catalogue  # noqa: E402
from i2l_ext.service.service import Service  # noqa: E402
from i2l_ext.webui import actions, gradio_versions, updates  # noqa: E402
from i2l_ext.webui.hosts.standalone import StandaloneHost  # noqa: E402
from i2l_ext.webui.tab import build_tab  # noqa: E402

HERE = {"host": "localhost:7860"}


class Request:
    headers = HERE


class Page:
    """The tab as a browser has it: its handlers by name, and what it was told."""

    def __init__(self, service, monkeypatch):
        self.service, self.seen, self.shown = service, {}, {}
        self.handlers = {}
        monkeypatch.setattr(
            gradio_versions,
            "on",
            lambda event, function, inputs, outputs: self.handlers.update({function.__name__: function}),
        )
        with gr.Blocks():
            build_tab(service)

    def poll(self):
        told = updates.changes(self.service, self.seen, {})
        self.shown.update(told)
        return told

    def settle(self):
        """Poll until nothing is at work."""
        end = time.monotonic() + 300  # a machine may be busy
        while self.service.queue.active() and time.monotonic() < end:
            time.sleep(0.05)
        self.poll()

    def press(self, pattern, **request):
        """Press the button of the last answers whose text is like this."""
        html = " ".join(str(text) for text in self.shown.values())
        [told] = set(re.findall(r'data-i2l-text="([^"]*)"[^>]*>(?=<span[^>]*>' + pattern + ")", html))
        told = told.replace("&quot;", '"')
        answer = actions.act(self.service, told, opened_here=request.get("here", True))
        self.shown.update(answer)
        return answer

    def make(self, picture):
        form = {"pictures": [[picture, 1.0]], "model": self.service.template_model.name}
        values = {"strength": 1.0, "dtype": "as made", "rank": "as made", "key_format": "diffsynth", "grey": True}
        from i2l_ext.webui.handlers import MAKE_FIELDS

        return self.handlers["make"](json.dumps(form), "it", "", *(values.get(name, "") for name in MAKE_FIELDS))


@pytest.fixture(params=template_world.targets("hidream-o1-v2"))
def service(request, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("I2L_DIFFSYNTH", raising=False)
    model = catalogue.MODELS[request.param]
    folder = tmp_path / "models" / model.template.repo
    template_world.write_template(folder, model.arch, first="# \u202e<b>hidden</b>\n")
    host = StandaloneHost(tmp_path, lora_folder=tmp_path / "Lora")
    host.settings_file.write({"i2l_models_folder": str(tmp_path / "models")})
    service = Service(host, tmp_path, [sys.executable, "-m", "i2l_ext.worker.main"])
    service.template_folder, service.template_model = folder, model
    while service.models.rows() is None:
        time.sleep(0.05)
    yield service
    service.queue.close()


@pytest.fixture
def page(service, monkeypatch):
    page = Page(service, monkeypatch)
    page.settle()
    return page


def picture(service, tmp_path):
    Image.new("RGB", (40, 40), (200, 40, 10)).save(tmp_path / "red.png")
    return service.uploads.take(tmp_path / "red.png")


def test_the_page_shows_whose_code_and_agrees_to_exactly_that(page, service, tmp_path):
    red, folder, model = picture(service, tmp_path), service.template_folder, service.template_model
    assert page.make(red)[:2] == ["", ""]
    page.settle()
    card = page.shown["make_offer"]
    for shown in (model.template.repo, "modelscope.cn/models/", "class Emb2Lora", "model.safetensors",
                  "This system stops", "DiffSynth-Studio is not set up here yet",
                  "Set up DiffSynth-Studio"):  # fmt: skip
        assert shown in card, shown
    from i2l_ext.v2_models.repository import TemplateRepository

    repository = TemplateRepository(folder, "", "")
    assert repository.digest in card and all(sha in card for sha in repository.hashes.values())
    assert "\\u202e&lt;b&gt;hidden" in card and "\u202e" not in card  # nothing of it acts on the page
    question = json.loads(re.findall(r"\{&quot;action&quot;: &quot;agree&quot;[^}]*\}", card)[0].replace("&quot;", '"'))
    for said in ({}, {"token": "guessed"}, {"token": None, "digest": repository.digest}):
        told = actions.act(service, json.dumps({**question, "token": "", **said}), opened_here=True)
        assert "out of date" in told["make_error"]
    told = page.press("I have read this and agree: run it")
    assert 'data-i2l-then="i2l_make"' in told["make_offer"]
    again = actions.act(service, json.dumps(question), opened_here=True)
    assert "out of date" in again["make_error"]  # a question is answered once
    assert page.poll().get("make_offer") is None  # the answer itself is no new question
    # agreed, but there is no DiffSynth-Studio yet: the page says what to do there
    page.make(red)
    page.settle()
    assert (
        "which is not set up here" in page.shown["make_activity"] and "--diffsynth" not in page.shown["make_activity"]
    )
    service.host.settings_file.write({"i2l_diffsynth": str(template_world.environment(tmp_path / "ds"))})
    page.make(red)
    page.settle()
    assert "it-grey" in page.shown["make_result"]
    made, theirs = Lora.read(tmp_path / "Lora/it.safetensors"), template_world.run_here(folder, [(200, 40, 10)])
    assert made.arch is model.arch and len(made) == 3
    assert inspect(tmp_path / "Lora/it.safetensors").key_format == "diffsynth"
    for path in made:
        for at, side in enumerate("AB"):
            torch.testing.assert_close(made[path][at], theirs[f"{path}.lora_{side}.default.weight"])
    # another hash asks again
    (folder / "model.py").write_text((folder / "model.py").read_text() + "\n")
    page.make(red)
    page.settle()
    assert "not agreed to run it as it is now" in page.shown["make_activity"]
    assert page.make(red)[:2] == ["", ""]
    page.settle()
    assert TemplateRepository(folder, "", "").digest in page.shown["make_offer"]
    assert len(list((tmp_path / "Lora").glob("*.safetensors"))) == 2


def test_nobody_agrees_or_sets_up_from_elsewhere(page, service, tmp_path, monkeypatch):
    name = service.template_model.name
    service.panes[service.consents.look(name).id] = "models"
    page.settle()
    for action in ("agree", "withdraw", "set_up"):
        told = actions.act(service, json.dumps({"action": action, "token": "x", "model": name, "pane": "models"}))
        assert "opened on this machine" in told["models_error"]
    token = re.findall(r"&quot;token&quot;: &quot;([^&]+)", page.shown["models_offer"])[0]
    monkeypatch.setattr(service.host, "is_local", False)
    for said in ({"action": "agree", "token": token}, {"action": "withdraw", "model": name}, {"action": "set_up"}):
        told = actions.act(service, json.dumps({**said, "pane": "models"}), opened_here=True)
        assert "at the machine itself" in told["models_error"]
    service.panes[service.consents.look(name).id] = "models"
    page.settle()
    assert f"i2l models trust {name}" in page.shown["models_offer"] and "&quot;token" not in page.shown["models_offer"]
    assert service.consents.is_needed(name)


def test_a_page_that_opens_asks_nothing_of_before(page, service, monkeypatch):
    name = service.template_model.name
    service.panes[service.consents.look(name).id] = "models"
    page.settle()
    assert "I have read this" in page.shown["models_offer"]
    other = Page(service, monkeypatch)
    other.settle()
    assert "models_offer" not in other.shown
    assert "See its code" in other.shown["models"] and "See its code" in other.shown["catalogue"]


def test_what_a_set_up_would_do_is_said_before(page, service):
    service.panes[service.consents.plan_setup().id] = "models"
    page.settle()
    offer = page.shown["models_offer"]
    assert all(said in offer for said in ("2.1.12", "0.4 GB", "1.4 GB", "PyPI", "Set it up"))
