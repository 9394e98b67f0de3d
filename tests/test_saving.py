"""A job that is cancelled or killed while it saves: it is done, with all its files, or nothing of it is there.

Engines are forks of this process, which has everything loaded, so that every step on the disk can be tried.
"""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("by forks of Linux", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from attacks import shelf  # noqa: E402
from i2l_ext.engine import process  # noqa: E402
from i2l_ext.engine.locks import Claim  # noqa: E402
from i2l_ext.engine.queue import ENDED, Queue  # noqa: E402
from i2l_ext.worker import main, tasks  # noqa: E402
from test_queue import until  # noqa: E402

STEPS = frozenset({"os.link", "os.rename", "os.mkdir", "os.remove"})
"""What gives files their names, or takes them away. To open one for writing is a step as well."""

STOP, PAUSE = 0.05, 0.25
"""Seconds until a kill, and for which an engine holds still meanwhile."""


MODES = "wb", "rb", "rb"


class Forked:
    """subprocess.Popen, as far as EngineProcess needs it: an engine in a fork."""

    before = staticmethod(lambda: None)

    def __init__(self, command, *, env, **rest):
        pipes = [os.pipe() for _ in range(3)]
        self.returncode = None
        self.pid = os.fork()
        if not self.pid:
            self._serve(pipes, env)
        ours = pipes[0][1], pipes[1][0], pipes[2][0]
        for number in (pipes[0][0], pipes[1][1], pipes[2][1]):
            os.close(number)
        self.stdin, self.stdout, self.stderr = (os.fdopen(pipe, mode) for pipe, mode in zip(ours, MODES, strict=True))

    def _serve(self, pipes, env):
        code = 99
        try:
            for number, pipe in enumerate((pipes[0][0], pipes[1][1], pipes[2][1])):
                os.dup2(pipe, number)
            for pipe in pipes:
                for number in pipe:
                    os.close(number)
            sys.stdin = io.TextIOWrapper(os.fdopen(0, "rb", closefd=False))
            sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            import torch

            torch.set_num_threads(1)  # the threads of its parent are not in the fork
            os.environ.update(env)
            self.before()
            code = main.main()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def poll(self):
        if self.returncode is None and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.returncode = 0
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or 60)
        while self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self.returncode = self.returncode or 0
                break
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", timeout)
            else:
                time.sleep(0.005)
        return self.returncode

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


def pausing(root, number, paused):
    """What makes a fork hold still before its step of that number within ``root``."""
    left = number

    def hear(event, args):
        nonlocal left
        writes = event in STEPS or (event == "open" and set(str(args[1])) & set("xwa+"))
        if writes and any(str(root) in str(arg) for arg in args[:2]):
            if left == 0:
                paused.touch()
                time.sleep(PAUSE)
            left -= 1  # from -1 on, it never comes to 0

    return lambda: sys.addaudithook(hear)


@pytest.fixture
def forks(monkeypatch, world, tmp_path):
    """Engines are forks; they may be told to hold still."""
    import torch  # noqa: F401 - loaded once, for all forks

    import i2l_ext.embed  # noqa: F401
    from i2l_ext.converters import consumers, export, rank  # noqa: F401

    monkeypatch.setattr(process.subprocess, "Popen", Forked)
    monkeypatch.setattr(process, "STOP_SECONDS", STOP)
    monkeypatch.setattr(tasks, "_draw", lambda file: time.sleep(20))
    return Forked


OLD, IT = Path("Lora/old.safetensors"), Path("Lora/it.safetensors")


def make(folder, world):
    pictures = [str(path) for path in world.pictures[:2]]
    return {"pictures": pictures, "folder": str(folder / "Lora"), "name": "it", "model": "small"}


def convert(folder, world):
    return {
        "file": str(folder / OLD),
        "key_format": "kohya",
        "output": str(folder / IT),
    }


def rank(folder, world):
    return {
        "file": str(folder / OLD),
        "rank": 2,
        "output": str(folder / IT),
    }


def merge(folder, world):
    files = [str(folder / "Lora" / f"{name}.safetensors") for name in ("old", "style")]
    return {"parts": files, "output": str(folder / IT)}


def export(folder, world):
    file = shelf.lora(folder / "big.safetensors", "z-image")
    return {"file": str(file), "trainer": "diffusers", "rank": 2, "output": str(folder / "training")}


def repair(folder, world):
    file = shelf.lora(folder / "big.safetensors", "z-image")
    repaired = {"output": str(folder / IT), "folder": str(folder / "training")}
    return {"file": str(file), "consumer": "musubi-tuner", **repaired}


KINDS = (make, convert, rank, merge, export, repair)


def new_files(folder, before):
    return sorted(name for name in shelf.state(folder) if name not in before)


@pytest.mark.parametrize("lay", KINDS, ids=lambda lay: lay.__name__)
def test_cancelled_at_each_step(forks, world, tmp_path, monkeypatch, lay):
    whole, states = None, []
    for number in range(-1, 60):
        here = tmp_path / str(number)
        shelf.lay(here)
        request, before, paused = lay(here, world), shelf.state(here), here / "paused"
        monkeypatch.setattr(
            forks, "before", staticmethod(pausing(here, number, paused) if number >= 0 else lambda: None)
        )
        queue = Queue(here / "state", ["fork"])
        job = queue.submit(lay.__name__, "it", {"request": request})
        until(lambda paused=paused, job=job: paused.exists() or job.state in ENDED, 60)
        if job.state not in ENDED:
            queue.cancel(job.id)
            queue.wait(job.id, 20)
        queue.close()
        paused_there = paused.exists()
        paused.unlink(missing_ok=True)
        left = new_files(here, before)
        if number < 0:
            assert job.state == "done", job.error
            whole = left
        else:
            states.append(job.state)
            assert (job.state, left) in [("done", whole), ("cancelled", [])], f"step {number}: {job.error} {job.tail}"
        if number >= 0 and not paused_there:
            break
    assert whole and {"done", "cancelled"} <= set(states)
    assert not shelf.harm(before, here, lambda name: False)


def test_cancelled_while_the_miniature_draws(forks, world, tmp_path):
    """The LoRA is there: it is done, and nobody waits for the drawing."""
    queue = Queue(tmp_path / "state", ["fork"])
    job = queue.submit("make", "it", {"request": make(tmp_path, world), "draw": True})
    until(lambda: (tmp_path / "Lora" / "it.safetensors").exists() and not Claim.on_saving(job.folder).is_held, 60)
    start = time.monotonic()
    queue.cancel(job.id)
    assert queue.wait(job.id, 5).state == "done" and time.monotonic() - start < 2
    assert (job.result["name"], job.result["drawn"]) == ("it", None) and job.result["picture"]
    queue.close()


def test_killed_from_outside_while_it_saves(forks, world, tmp_path, monkeypatch):
    """The page says where to look."""
    shelf.lay(tmp_path)
    paused = tmp_path / "paused"
    output = tmp_path / "Lora" / "it.safetensors"

    def before():
        def hear(event, args):
            if event == "os.link" and str(args[1]) == str(output):
                paused.touch()
                time.sleep(5)

        sys.addaudithook(hear)

    monkeypatch.setattr(forks, "before", staticmethod(before))
    queue = Queue(tmp_path / "state", ["fork"])
    job = queue.submit("convert", "it", {"request": convert(tmp_path, world)})
    until(paused.exists, 60)
    os.kill(queue._engines[job.id].process.pid, signal.SIGKILL)
    queue.wait(job.id, 10)
    assert (job.state, job.code) == ("failed", "cut_off") and "Look into their folder" in job.error
    queue.close()
