"""Jobs in trouble: engines that do not read or end early, hosts that raise, two WebUIs at once, results too long."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import ModuleType

import pytest

from i2l_ext.engine import job, locks, process, records
from i2l_ext.engine import queue as queues
from i2l_ext.engine.job import Job, Progress
from i2l_ext.engine.queue import ENDED, Queue
from test_queue import OWNER, SMALL, until

QUIET = [sys.executable, "-c", ""]
"""An engine that says nothing: its jobs fail at once."""


def in_time(call, seconds=3.0):
    """What it gives. It runs on a thread, so that a test of what may hang ends."""
    given = []
    thread = threading.Thread(target=lambda: given.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert given, "it hangs"
    return given[0]


def done(queue, kind="slow", **request):
    known = {"times": 1} if kind == "slow" else {}
    return queue.wait(queue.submit(kind, kind, {"request": request or known}).id, 20)


# --- engines ----------------------------------------------------------------------------------------------------


def test_an_embedded_python_finds_the_engine(tmp_path):
    """It looks neither at the folder where it runs nor at PYTHONPATH, as with -I; -S hides what is installed here."""
    python, *words = process.command()
    queue = Queue(tmp_path / "state", [python, "-I", "-S", *words])
    ended = done(queue, "nonsense")
    assert ended.error.startswith("The engine does not know this kind of job"), ended.tail
    queue.close()


class WindowsPipe(io.BytesIO):
    def write(self, data):
        raise OSError(errno.EINVAL, "Invalid argument")


class WindowsProcess(subprocess.Popen):
    """There a write to a process that is gone is no broken pipe."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.wait()
        self.stdin.close()
        self.stdin = WindowsPipe()


def test_an_engine_that_dies_at_its_start_is_told_by_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr(process.subprocess, "Popen", WindowsProcess)
    queue = Queue(tmp_path / "state", [sys.executable, "-c", "import sys; sys.exit('No module named torch')"])
    ended = done(queue)
    assert ended.error.startswith("The engine ended unexpectedly (code 1)")
    assert ended.tail == ["No module named torch"] and "package is missing" in ended.hint
    queue.close()


def test_a_request_that_nobody_reads_holds_nobody_up(tmp_path):
    queue = Queue(tmp_path / "state", [sys.executable, "-c", "import time; time.sleep(20)"])
    asked = queue.submit("slow", "Large", {"request": {"text": "x" * (8 << 20)}})
    until(lambda: asked.state == "running")
    time.sleep(0.3)
    assert in_time(queue.active) == [asked]
    assert in_time(lambda: queue.cancel(asked.id))
    assert in_time(lambda: queue.wait(asked.id)).state == "cancelled"
    queue.close()


def test_a_start_that_takes_its_time_holds_nobody_up(tmp_path, monkeypatch):
    start, go = process.EngineProcess, threading.Event()
    monkeypatch.setattr(process, "EngineProcess", lambda *args: go.wait(10) and start(*args))
    queue = Queue(tmp_path / "state", SMALL)
    asked = queue.submit("slow", "Long", {})
    until(lambda: asked.state == "running")
    assert in_time(lambda: queue.cancel(asked.id))
    assert in_time(queue.active) == [asked]
    go.set()
    assert queue.wait(asked.id, 5).state == "cancelled"
    queue.close()


def test_a_result_too_long_for_a_line(tmp_path):
    queue = Queue(tmp_path / "state", SMALL)
    ended = done(queue, "large")
    assert (ended.state, len(ended.result)) == ("done", 5 << 20), ended.error
    assert ended.tail == ["(a line of more than 4 MB)"]
    queue.close()


@pytest.mark.skipif(os.name == "nt", reason="sleep is Unix's")
def test_what_an_engine_has_started_holds_nobody_up(tmp_path):
    queue = Queue(tmp_path / "state", SMALL)
    assert queue.wait(queue.submit("parent", "Parent", {}).id, 5).result == "born"
    queue.close()


def test_a_plan_that_changes_while_it_is_looked_at(tmp_path):
    class Meddled(dict):
        """While it is looked at, another thread takes in what the engine says next."""

        def get(self, key, default=None):
            steps = [{"id": str(number), "title": "a"} for number in range(9)]
            for event in ({"event": "plan", "steps": steps}, {"event": "step", "step": "8", "share": 1}):
                asked.progress = asked.progress.apply_event(event)
            asked.result = "of later"
            return super().get(key, default)

    asked = Job("ab", "make", "Make", {}, tmp_path, state="running", progress=Progress((Meddled(title="one"),)))
    view = asked.view()
    assert view["result"] is None and view["share"] == 0
    assert view["step"] == {"title": "one", "number": 1, "of": 1, "share": 0}
    assert (asked.view()["share"], asked.view()["step"]["number"]) == (1, 9)


def test_the_time_left_is_estimated_after_a_step_that_was_cached(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(job.time, "monotonic", lambda: next(clock))
    progress = Progress().apply_event(
        {"event": "plan", "steps": [{"id": "a", "title": "a"}, {"id": "b", "title": "b"}]}
    )
    for tenth in range(1, 6):
        progress = progress.apply_event({"event": "step", "step": "b", "share": tenth / 10, "cached": ["a"]})
    assert progress.steps[0]["cached"] and progress.left == pytest.approx(5)


# --- hosts ------------------------------------------------------------------------------------------------------


def test_nothing_is_seen_before_it_is_hidden(tmp_path):
    def hide(ended):
        time.sleep(0.2)
        ended.result = "hidden"

    queue, seen = Queue(tmp_path / "state", SMALL, redact=hide), []
    asked = queue.submit("babble", "Babble", {})
    while asked.state not in ENDED:
        seen.append(asked.view())
    views = [(view["state"], view["result"]) for view in (*seen, asked.view())]
    assert set(views) <= {("waiting", None), ("running", None), ("done", "hidden")}
    queue.close()


def test_what_cannot_be_hidden_is_not_seen_and_nobody_waits_for_ever(tmp_path):
    def hide(ended):
        raise OSError("the share is gone")

    queue = Queue(tmp_path / "state", SMALL, redact=hide)
    ended = done(queue, "babble")
    assert (ended.state, ended.result, ended.tail) == ("failed", None, [])
    assert "cannot be shown (OSError)" in ended.error
    stopped = queue.submit("slow", "Long", {})
    assert queue.cancel(stopped.id) and queue.wait(stopped.id, 5).state == "cancelled"
    shutil.copytree(queue.folder, tmp_path / "state" / "1-old")
    assert {job.id for job in Queue(tmp_path / "state", SMALL, redact=hide).jobs()} == {ended.id, stopped.id}
    queue.close()


@pytest.mark.parametrize("error", [OSError, SystemExit])
def test_a_host_that_raises_does_not_stop_its_lane(tmp_path, error):
    @contextmanager
    def around(asked):
        if asked.title == "bad":
            raise error("no")
        yield

    queue = Queue(tmp_path / "state", SMALL, run_in=around)
    assert f"did not let it run: {error.__name__}" in queue.wait(queue.submit("slow", "bad", {}).id, 5).error
    assert done(queue).state == "done"
    queue.close()


def test_a_job_cancelled_in_line_leaves_the_hosts_model_alone(tmp_path, monkeypatch):
    from i2l_ext.webui.hosts.webui import WebUIHost

    modules, freed, held = ModuleType("modules"), [], threading.Lock()
    modules.call_queue = type("call_queue", (), {"queue_lock": held})
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setattr(WebUIHost, "option", lambda self, key: True)
    monkeypatch.setattr(WebUIHost, "_free_vram", lambda self: freed.append(1))
    queue = Queue(tmp_path / "state", SMALL, run_in=object.__new__(WebUIHost).exclusive_gpu)
    with held:
        asked = queue.submit("slow", "In line", {})
        time.sleep(0.2)
        assert asked.state == "waiting" and queue.cancel(asked.id)
    assert done(queue).state == "done"
    assert freed == [1], "only the second has run"
    queue.close()


# --- what is kept -----------------------------------------------------------------------------------------------


def test_looks_push_no_other_job_out(tmp_path, monkeypatch):
    monkeypatch.setattr(queues, "MAX_KEPT", 2)
    monkeypatch.setattr(queues, "MAX_KEPT_BRIEF", 1)
    queue = Queue(tmp_path / "state", QUIET)
    made = [done(queue, "make") for _ in range(2)]
    seen = [done(queue, kind) for kind in ("look", "models", "look", "look")]
    assert queue.jobs() == [*made, *seen[-2:]]  # the last came after it was last looked over
    queue.close()


@pytest.mark.parametrize("way", ["removed", "held"])
def test_two_that_start_at_once(tmp_path, monkeypatch, way):
    """One finds the other's new folder in the moment before it is locked."""
    take, others = locks._take, []

    def late(stream):
        if not others:
            others.append(None)
            if way == "held":
                raise BlockingIOError
            others[0] = Queue(tmp_path / "state", SMALL)
        take(stream)

    monkeypatch.setattr(locks, "_take", late)
    queue = Queue(tmp_path / "state", SMALL)
    queues = [queue, *filter(None, others), Queue(tmp_path / "state", SMALL)]
    assert all((one.folder / "lock").is_file() for one in queues)
    assert done(queue).state == "done"
    assert (queue.folder / "lock").is_file()
    for one in queues:
        one.close()
    assert not list((tmp_path / "state").iterdir())


def test_a_disk_without_locks(tmp_path, monkeypatch):
    def never(stream):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_take", never)
    queue = Queue(tmp_path / "state", SMALL)
    assert done(queue).state == "done" and [queue.folder] == list((tmp_path / "state").iterdir())
    queue.close()


def test_a_record_is_on_disk_all_the_time(tmp_path, monkeypatch):
    state, remove, seen = tmp_path / "state", shutil.rmtree, []
    old = state / "1-old"
    old.mkdir(parents=True)
    (old / "lock").touch()
    view = Job("ab", "make", "Make", {}, old / "ab", state="done", started=1.0, ended=2.0).view()
    (old / "ab.json").write_text(json.dumps(view))

    def removed(folder, **named):
        seen.append(len(list(state.glob("*/ab.json"))))
        remove(folder, **named)

    monkeypatch.setattr(shutil, "rmtree", removed)
    queue = Queue(state, SMALL)
    assert seen[0] == 2 and not old.exists()
    queue.close()


@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9")
@pytest.mark.parametrize("patient", [True, False])
def test_an_engine_that_outlives_its_webui_is_waited_for(tmp_path, monkeypatch, patient):
    state, told = tmp_path / "state", []
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(state), SMALL[1], "late"], stdout=subprocess.PIPE, cwd=process.ROOT
    )
    owner.stdout.readline()
    until(lambda: list(state.glob("*/*/lock")))
    [old] = state.iterdir()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    monkeypatch.setattr(queues, "ORPHAN_SECONDS", queues.ORPHAN_SECONDS if patient else 0)
    heir = Queue(state, SMALL, on_end=told.append)
    asked, waiting = heir.active()
    assert waiting.title == "Never begun"
    assert asked.state == "stopping" and asked.view()["title"] == "Cut off" and old.exists()
    assert Queue(state, SMALL).jobs() == [], "its jobs are the heir's"
    assert heir.wait(asked.id, 10).state == ("done" if patient else "failed")
    assert asked.result == ("in time" if patient else None)
    until(lambda: told == [asked] and not old.exists())
    assert waiting.state in ("waiting", "running")
    assert records.read_job(heir.folder / f"{asked.id}.json").result == asked.result
    heir.close()
