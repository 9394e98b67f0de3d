"""The server behind the tab and the HTTP interface: many threads at once, disks that fail, what is looked up how often."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from i2l_ext import jobs, library
from i2l_ext.webui.desk import Desk, Wish
from i2l_ext.webui.host import Alone
from i2l_ext.webui.recent import Recent
from i2l_ext.webui.settings import Stored

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
def desk(tmp_path, monkeypatch):
    """Its jobs wait for ever: no lane is started."""
    monkeypatch.setattr(jobs.Queue, "_run_lane", lambda queue, lane: None)
    desk = Desk(Alone(tmp_path, lora_folder=tmp_path / "Lora"), tmp_path, [sys.executable, "-c", "raise SystemExit(9)"])
    desk.host.lora_folder().mkdir()
    yield desk
    desk.queue.close()


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


def test_models_are_looked_for_once_by_however_many(desk, monkeypatch):
    slowly(monkeypatch, desk.queue, "submit")
    assert at_once(lambda number: desk.models()) == [None] * MANY
    [job] = desk.queue.jobs()
    rows = [{"name": "mini"}]

    class Slow(jobs.Job):
        @property
        def state(self):
            time.sleep(0.01)  # between the look at it and its use
            return self.__dict__["state"]

        @state.setter
        def state(self, value):
            self.__dict__["state"] = value

    job.__class__ = Slow
    end(job, rows)
    assert at_once(lambda number: desk.models()) == [rows] * MANY
    assert len(desk.queue.jobs()) == 1


def test_a_search_that_began_before_a_change_is_followed_by_another(desk):
    desk.models()
    [first] = desk.queue.jobs()
    desk.models(anew=True)  # a download has ended while it was under way
    end(first, [])
    desk.models()
    assert len(desk.queue.jobs()) == 2
    end(desk.queue.jobs()[1], [{"name": "mini"}])
    assert [desk.models() for _ in range(3)][-1] == [{"name": "mini"}] and len(desk.queue.jobs()) == 2


def test_a_full_queue_does_not_keep_the_page_from_its_answer(desk, monkeypatch):
    monkeypatch.setattr(jobs, "WAITING", 0)
    assert desk.models() is None
    monkeypatch.undo()
    desk.models()
    assert len(desk.queue.jobs()) == 1


def test_no_two_jobs_are_promised_the_same_name(desk, tmp_path, monkeypatch):
    picture = desk.uploads.take(_picture(tmp_path))
    slowly(monkeypatch, library, "names_below")
    lora = desk.host.lora_folder() / "style.safetensors"
    made = at_once(lambda number: desk.make(Wish([picture], "Style", "mini")), 6)
    assert sorted(job.title for job in made) == ["Style", *(f"Style-{number}" for number in range(2, 7))]
    assert {job.request["order"]["name"] for job in made} == {job.title for job in made}
    assert desk.saved_name("STYLE") == "STYLE-7"
    converted = at_once(lambda number: desk.convert(lora, lora.name, "kohya"), 6)
    assert len({job.request["arguments"][-1] for job in converted}) == 6
    lora.touch()
    inspected = desk.inspect(lora, lora.name)
    mended = at_once(lambda number: desk.mend(inspected.id, "kohya"), 2)
    assert (
        len({job.request["output"] for job in mended}) == len({job.request["folder_of_export"] for job in mended}) == 2
    )


def test_no_two_jobs_are_promised_the_same_folder(desk, monkeypatch):
    slowly(monkeypatch, desk, "_training")
    lora = desk.host.lora_folder() / "style.safetensors"
    targets = [
        job.request["arguments"][-1] for job in at_once(lambda n: desk.export(lora, lora.name, "diffusers", 4), 6)
    ]
    assert len(set(targets)) == 6


def test_settings_of_several_pages_do_not_undo_each_other(tmp_path, monkeypatch):
    stored = Stored(tmp_path / "settings.json")
    values = {"i2l_device": "cpu", "i2l_memory": "6GB", "i2l_model": "mini", "i2l_dtype": "bf16", "i2l_subfolder": "a"}
    keys = list(values)
    slowly(monkeypatch, stored, "read")
    at_once(lambda number: stored.write({keys[number]: values[keys[number]]}), len(keys))
    held = stored.read()
    assert {key: held[key] for key in keys} == values
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_the_trouble_may_be_over_while_a_page_is_answered(desk):
    pytest.importorskip("gradio")
    from i2l_ext.webui import tab

    class Fleeting(Desk):
        left = 2

        @property
        def trouble(self):
            self.left -= 1
            return self._trouble if self.left >= 0 else None

        @trouble.setter
        def trouble(self, job):
            self._trouble = job

    trouble = desk.queue.submit("models", "", {})
    end(trouble, error="no engine")
    desk.__class__, desk._trouble, desk._asked = Fleeting, trouble, desk.queue.submit("models", "", {})
    _, shown = tab._answer(desk, {}, {}, ["models"])
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


def test_typing_a_name_walks_the_folder_once(desk, walks, monkeypatch):
    text = "a_rather_long_name"
    for length in range(1, len(text) + 1):
        assert desk.saved_name(text[:length]) == text[:length]
    assert len(walks) == 1
    at_once(lambda number: desk.saved_name(f"name{number}"))
    assert len(walks) == 1


def test_what_is_promised_is_looked_up_then(desk, walks, tmp_path):
    assert desk.saved_name("style") == "style"
    (desk.host.lora_folder() / "style.safetensors").touch()
    job = desk.make(Wish([desk.uploads.take(_picture(tmp_path))], "style", "mini"))
    assert job.title == "style-2" and len(walks) == 2
    assert desk.saved_name("style-2") == "style-2-2"
    end(job, {})
    desk._after(job)
    assert desk.saved_name("style") == "style-2" and len(walks) == 3


def test_a_moment_ends(monkeypatch):
    now, looked = [0.0], []
    monkeypatch.setattr("i2l_ext.webui.recent.time.monotonic", lambda: now[0])
    recent = Recent(lambda key: looked.append(key) or len(looked), 5)
    assert [recent("a"), recent("a"), recent("b")] == [1, 1, 2]
    now[0] = 6
    assert recent("b") == 3
    recent.forget()
    assert recent("b") == 4
