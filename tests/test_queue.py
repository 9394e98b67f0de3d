"""Jobs: progress, cancel, queue, failures, and what is found after either side was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from i2l_ext import private_packages
from i2l_ext.engine import failures, process
from i2l_ext.engine import queue as queues
from i2l_ext.engine.queue import Queue, QueueFull

HERE = Path(__file__).resolve().parent
SMALL = [sys.executable, str(HERE / "small_engine.py")]


@pytest.fixture
def queue(tmp_path):
    queue = Queue(tmp_path / "state", SMALL)
    yield queue
    queue.close()


def until(test, seconds=20.0):
    end = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_progress_moves_and_the_result_comes(queue):
    job = queue.submit("slow", "Slow", {"request": {"times": 150}})
    until(lambda: job.total > 0)
    seen = {job.total}
    until(lambda: seen.add(job.total) or job.state == "done")
    assert job.result == {"slept": True} and job.total == 1
    assert len(seen) > 10
    assert job.progress.steps[1] == {"id": "slow", "title": "slow", "bytes": 1000, "layers": 10}


def test_the_time_left_is_estimated(queue):
    job = queue.submit("slow", "Slow", {})
    until(lambda: job.left is not None and job.total > 0.1)
    assert 5 < job.left < 60
    assert job.view()["left"] == pytest.approx(job.left, rel=0.2)


@pytest.mark.parametrize("kind", ["slow", "deaf"])
def test_cancel_within_a_second(queue, kind):
    job = queue.submit(kind, "Long", {})
    until(lambda: job.progress.steps)
    process = queue._engines[job.id].process
    start = time.monotonic()
    assert queue.cancel(job.id)
    assert queue.wait(job.id, 5).state == "cancelled"
    assert time.monotonic() - start < 1
    assert not alive(process.pid)
    assert not queue.cancel(job.id)


def test_cancel_before_the_engine_is_up(queue):
    job = queue.submit("slow", "Long", {})
    until(lambda: job.state == "running")
    queue.cancel(job.id)
    assert queue.wait(job.id, 2).state == "cancelled"


def test_one_at_a_time_and_the_others_wait(queue):
    first, second = (queue.submit("slow", name, {"request": {"times": 4}}) for name in ("one", "two"))
    third = queue.submit("slow", "three", {})
    until(lambda: first.state == "running")
    assert [job.state for job in queue.active()] == ["running", "waiting", "waiting"]
    assert queue.cancel(third.id) and third.state == "cancelled"
    assert queue.wait(second.id, 20).state == "done"
    assert second.started >= first.ended


def test_what_waits_can_be_given_up_and_says_why(queue):
    first, second = (queue.submit("slow", name, {}) for name in ("one", "two"))
    until(lambda: first.state == "running")
    for job in (first, second):
        queue.give_up(job.id, "Not made: the download failed.", "weights_missing")
    assert (second.state, second.error, second.code) == ("failed", "Not made: the download failed.", "weights_missing")
    assert first.state == "running" and not queue.cancel(second.id)


def test_a_look_does_not_wait_for_the_long_ones(queue):
    long = queue.submit("slow", "Long", {})
    look = queue.submit("models", "Models", {})
    assert queue.wait(look.id, 30).state == "done", look.error
    assert long.state == "running"
    assert {row["name"] for row in look.result} >= {"qwen-image-style"}


def test_the_queue_has_an_end(queue):
    queue.submit("slow", "first", {})
    until(lambda: not any(job.state == "waiting" for job in queue.jobs()))
    for number in range(queues.MAX_WAITING):
        queue.submit("slow", str(number), {})
    with pytest.raises(QueueFull):
        queue.submit("slow", "one too many", {})


def test_a_failure_shows_its_words_and_a_hint(queue):
    job = queue.wait(queue.submit("fail", "Fail", {}).id, 20)
    assert (job.state, job.error) == ("failed", "MemoryError: not enough of it")
    assert "Memory ran out" in job.hint and job.view()["code"] == "out_of_memory"
    assert any("Traceback" in line for line in job.tail) and "a line for nobody" in job.tail


def test_a_refusal_is_one_line(queue):
    job = queue.wait(queue.submit("refuse", "Refuse", {}).id, 20)
    assert (job.state, job.error) == ("failed", "model files are missing: i2l models download")
    assert job.tail == [] and "Download" in job.hint and job.code == "weights_missing"


def test_a_killed_engine_is_told_of(queue):
    job = queue.wait(queue.submit("die", "Die", {}).id, 20)
    assert job.state == "failed" and "signal 9" in job.error and "Memory" in job.hint
    assert job.code == "out_of_memory"
    assert queue.wait(queue.submit("slow", "next", {"request": {"times": 1}}).id, 20).state == "done"


def test_a_note_stands_with_the_output(queue):
    job = queue.wait(queue.submit("note", "Note", {}).id, 20)
    assert (job.state, job.code, job.tail) == ("done", None, ["two keys were left out"])


def test_a_message_of_another_version_is_refused(queue, monkeypatch):
    monkeypatch.setattr(queues, "PROTOCOL", queues.PROTOCOL - 1)
    job = queue.wait(queue.submit("slow", "Old", {"request": {"times": 1}}).id, 20)
    assert (job.state, job.code) == ("failed", "bad_request") and "restart the WebUI" in job.error


@pytest.mark.parametrize(
    ("lines", "exit_code", "code"),
    [
        (["torch.OutOfMemoryError: CUDA out of memory"], 1, "out_of_memory"),
        ([], -9, "out_of_memory"),
        ([], 137, "out_of_memory"),
        (["OSError: [Errno 28] No space left on device"], 1, "disk_full"),
        (["ModuleNotFoundError: No module named 'torch'"], 1, "package_missing"),
        (["RuntimeError: CUDA error: no kernel image is available"], 1, "gpu_refused"),
        (["something else"], 1, None),
    ],
)
def test_a_failure_without_a_code_is_told_by_its_output(lines, exit_code, code):
    assert failures.diagnose(lines, exit_code) == code
    assert code is None or failures.HINTS[code]


def test_lines_that_are_no_events_do_no_harm(queue):
    job = queue.wait(queue.submit("babble", "Babble", {}).id, 20)
    assert (job.state, job.result) == ("done", "fine")
    assert "not json" in job.tail


def test_an_engine_that_cannot_start(tmp_path):
    queue = Queue(tmp_path / "state", ["/nonexistent/python"])
    assert queue.wait(queue.submit("slow", "x", {}).id, 5).error.startswith("The engine cannot be started")
    queue.close()


def test_around_and_after(tmp_path):
    from contextlib import contextmanager

    seen = []

    @contextmanager
    def around(job):
        seen.append("in")
        yield
        seen.append("out")

    queue = Queue(tmp_path / "state", SMALL, run_in=around, on_end=lambda job: seen.append(job.state))
    queue.submit("slow", "x", {"request": {"times": 1}})
    until(lambda: len(seen) == 3)
    assert seen == ["in", "out", "done"]
    queue.close()


OWNER = """
import sys, time
from pathlib import Path
from i2l_ext.engine.queue import Queue
queue = Queue(Path(sys.argv[1]), [sys.executable, sys.argv[2]])
queue.submit(sys.argv[3], "Cut off", {})
queue.submit("slow", "Never begun", {})
time.sleep(0.2)
while not any(engine.process.pid for engine in queue._engines.values()):
    time.sleep(0.01)
print(*(engine.process.pid for engine in queue._engines.values()), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9")
@pytest.mark.parametrize("kind", ["slow", "deaf"])
def test_a_killed_owner_leaves_no_engine_and_the_next_one_knows(tmp_path, monkeypatch, kind):
    state = tmp_path / "state"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(state), SMALL[1], kind], stdout=subprocess.PIPE, cwd=process.ROOT
    )
    engine = int(owner.stdout.readline())
    assert alive(engine)
    records = next(state.iterdir())
    other = Queue(state, SMALL)
    assert other.jobs() == [], "the jobs of a living process are its own"
    time.sleep(0.7)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    until(lambda: not alive(engine), 15)
    heir = Queue(state, SMALL)
    cut_off, waiting = heir.jobs()
    assert (cut_off.title, waiting.title) == ("Cut off", "Never begun")
    assert (cut_off.state, cut_off.code) == ("failed", "cut_off"), "nobody has cancelled it"
    assert "closed or stopped while this was at work" in cut_off.error
    until(lambda: waiting.state == "running" and waiting.total > 0)
    assert not records.exists()
    heir.close()
    other.close()
    assert list(state.iterdir()) == []


def left_by(folder, id, message=None, outcome=None, **view):
    """What a process that has ended left of a job in its folder."""
    old = folder / "1-x"
    old.mkdir(parents=True, exist_ok=True)
    (old / "lock").touch()
    own = {"protocol": queues.PROTOCOL, "message": message}
    record = queues.Job(id, "slow", f"Job {id}", {}, old / id, **view).view() | own
    (old / f"{id}.json").write_text(json.dumps(record | {"was_cancelled": view.get("was_cancelled", False)}))
    if outcome:
        (old / f"{id}.outcome.json").write_text(json.dumps(outcome))
    return old


def test_what_waited_is_taken_up_and_runs(tmp_path):
    state, message = tmp_path / "state", {"request": {"times": 2}}
    for number in range(3):
        left_by(state, f"a{number}", message, created=float(number))
    queue = Queue(state, SMALL)
    assert [job.title for job in queue.jobs()] == ["Job a0", "Job a1", "Job a2"]
    for job in queue.jobs():
        assert queue.wait(job.id, 30).result == {"slept": True}
    assert [job.started for job in queue.jobs()] == sorted(job.started for job in queue.jobs())
    queue.close()


@pytest.mark.parametrize("harm", [{"protocol": 1}, {"message": None}, {"message": [1]}, {"kind": "models"}])
def test_what_waited_and_cannot_be_taken_up_is_told(tmp_path, harm):
    file = left_by(tmp_path / "state", "ab", {"request": {}}) / "ab.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | harm))
    queue = Queue(tmp_path / "state", SMALL)
    [job] = queue.jobs()
    assert (job.state, job.code) == ("failed", "lost") and "Start it again" in job.error
    queue.close()


@pytest.mark.parametrize("by_user", [True, False])
def test_cancelled_is_what_somebody_cancelled(tmp_path, by_user):
    """An engine whose WebUI has gone says that it was stopped. Why, only the record knows."""
    outcome = {"event": "cancelled"}
    left_by(tmp_path / "state", "ab", None, outcome, state="running", started=1.0, was_cancelled=by_user)
    [job] = Queue(tmp_path / "state", SMALL).jobs()
    assert job.state == ("cancelled" if by_user else "failed")
    assert by_user or (job.code == "cut_off" and "closed or stopped" in job.error)


def test_a_job_that_is_being_cancelled_has_that_in_its_record(queue):
    job = queue.submit("deaf", "Long", {})
    until(lambda: job.progress.steps)
    queue.cancel(job.id)
    assert json.loads((queue.folder / f"{job.id}.json").read_text())["was_cancelled"] is True
    assert queue.wait(job.id, 5).state == "cancelled"


def test_what_an_engine_finished_alone_is_done(tmp_path):
    old = tmp_path / "state" / "1-x"
    old.mkdir(parents=True)
    (old / "lock").touch()
    view = queues.Job("ab", "make", "Make", {}, old / "ab", state="running", started=1.0).view()
    (old / "ab.json").write_text(json.dumps(view))
    (old / "ab.outcome.json").write_text(json.dumps({"event": "done", "result": {"name": "it"}}))
    (old / "cd.json").write_text("{half a rec")
    queue = Queue(tmp_path / "state", SMALL)
    [job] = queue.jobs()
    assert (job.state, job.result) == ("done", {"name": "it"})
    queue.close()


def test_only_so_many_ended_jobs_are_kept(queue, monkeypatch):
    monkeypatch.setattr(queues, "MAX_KEPT", 2)
    ids = [queue.submit("slow", str(number), {"request": {"times": 0}}).id for number in range(4)]
    queue.wait(ids[-1], 30)
    last = queue.submit("slow", "last", {"request": {"times": 0}})
    assert {job.id for job in queue.jobs()} == {*ids[2:], last.id}
    queue.wait(last.id, 20)


def test_the_queue_imports_nothing_heavy():
    code = "import sys, i2l_ext.engine.queue; print(*sorted(m for m in sys.modules if m.split('.')[0] in " \
           "('torch', 'transformers', 'numpy', 'PIL', 'gradio')))"  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=process.ROOT)
    assert out.stdout.strip() == ""


def test_make_on_a_small_model_and_again_from_the_cache(world, tmp_path, monkeypatch):
    monkeypatch.setenv("I2L_TEST_SMALL", "1")
    queue = Queue(tmp_path / "state", SMALL)
    folder = tmp_path / "Lora"
    request = {"pictures": [str(p) for p in world.pictures], "folder": str(folder), "name": "it", "model": "small"}
    first = queue.wait(queue.submit("make", "Make", {"request": request}).id, 600)
    assert first.state == "done", first.tail
    assert Path(first.result["file"]).is_file() and first.result["prompt"] == "<lora:it:1>"
    assert [step["title"] for step in first.progress.steps] == [
        "start", "encode small-siglip2", "encode small-dinov3", "decode",
    ]  # fmt: skip
    assert first.view()["cached"] == []
    again = queue.submit("make", "Make", {"request": {**request, "weights": [1, 2, 3]}})
    assert queue.wait(again.id, 600).state == "done", again.tail
    assert again.result["name"] == "it-2"
    assert again.view()["cached"] == ["encode small-siglip2", "encode small-dinov3"]
    queue.close()


def test_a_cancelled_make_leaves_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setenv("I2L_TEST_SMALL", "1")
    queue, folder = Queue(tmp_path / "state", SMALL), tmp_path / "Lora"
    request = {"pictures": [str(p) for p in world.pictures], "folder": str(folder), "name": "it", "model": "small-all"}
    job = queue.submit("make", "Make", {"request": request})
    until(lambda: job.progress.step > 0, 60)
    queue.cancel(job.id)
    assert queue.wait(job.id, 2).state == "cancelled"
    assert not folder.exists() or not list(folder.iterdir())
    queue.close()


def test_state_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("I2L_STATE", str(tmp_path))
    assert queues.state_folder() == tmp_path
    monkeypatch.delenv("I2L_STATE")
    assert queues.state_folder() in (process.ROOT / ".private" / "state", queues.state_folder())
    assert private_packages.FOLDER.parent == process.ROOT / ".private"
