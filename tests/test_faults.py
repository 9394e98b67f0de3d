"""The short forms of benchmarks/faults.py: kills, disks that fail, clocks that jump, others at the same name."""

import errno
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

if sys.platform != "linux":
    pytest.skip("by /proc, forks and locks of Linux", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from attacks import disks, kills, shelf  # noqa: E402
from i2l_ext import library  # noqa: E402
from i2l_ext.converters import atomic  # noqa: E402
from i2l_ext.converters.errors import UserError  # noqa: E402
from i2l_ext.engine.queue import Queue  # noqa: E402

DEEDS = {deed.name: deed for deed in kills.deeds() if deed.name in ("convert over an old one", "export")}


def save(folder, name="style", overwrite=True):
    from PIL import Image

    source = (folder / "Lora" / "old.safetensors").read_bytes()
    library.save_lora(
        folder / "Lora", name, lambda path, stem: path.write_bytes(source), preview=Image.new("RGB", (8, 8)),
        sidecar={"notes": "new"}, overwrite=overwrite,
    )  # fmt: skip
    return 0


SAVE = kills.Deed("save over an old one", shelf.lay, save, kills.is_style)
FRESH = kills.Deed("save", shelf.lay, partial(save, name="new", overwrite=False))


def broken_off(folder):
    """Ctrl-C just after the last file got its name: everything is taken back."""
    steps = iter(range(3))

    def place(part, path, *, overwrite):
        atomic.place(part, path, overwrite=overwrite)
        if next(steps) == 2:
            raise KeyboardInterrupt

    with mock.patch.object(library.folder, "place", place), pytest.raises(KeyboardInterrupt):
        save(folder)
    return 0


BROKEN = kills.Deed("save broken off", shelf.lay, broken_off, kills.is_style)
SAVES = [SAVE, FRESH, BROKEN]


@pytest.mark.parametrize("deed", [*SAVES, *map(kills.linkless, SAVES), *DEEDS.values()], ids=lambda deed: deed.name)
def test_killed_before_each_step_on_the_disk(deed, tmp_path):
    toll = kills.steps(deed, tmp_path / "d")
    assert toll.tried > 5 and toll.met == toll.tried - 1
    assert toll.writing, "no kill met a file on its way: the test proves nothing"
    assert not toll.harm


def test_killed_at_random_moments(tmp_path):
    toll = kills.kill(SAVE, 6, 0, tmp_path / "d")
    assert toll.tried == 6 and not toll.harm


def test_a_harm_is_seen(tmp_path):
    """Each kind, so that a run without any means something."""
    shelf.lay(tmp_path)
    before = shelf.state(tmp_path)
    assert not shelf.harm(before, tmp_path, lambda name: False)
    (tmp_path / "Lora" / "notes.txt").unlink()
    (tmp_path / "Lora" / "style.json").write_text("{")
    file = tmp_path / "Lora" / "old.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found = shelf.harm(before, tmp_path, kills.is_style)
    assert [text.split()[0] for text in found] == [
        "Lora/notes.txt", "Lora/old.safetensors", "old.safetensors:", "style.json:"
    ]  # fmt: skip


@pytest.mark.parametrize("deed", [SAVE, *DEEDS.values()], ids=lambda deed: deed.name)
@pytest.mark.parametrize(
    ("code", "writes"), [(errno.ENOSPC, True), (errno.EIO, True), (errno.EIO, False)], ids=["full", "write", "read"]
)
def test_a_disk_that_fails_at_a_byte(deed, code, writes, tmp_path):
    if deed is SAVE and not writes:
        pytest.skip("it reads nothing")
    trouble = disks.failing(deed, 5, 0, tmp_path, code, writes=writes)
    assert trouble.tried == 5 and trouble.done < 5 and not trouble.harm


@pytest.mark.parametrize("deed", DEEDS.values(), ids=lambda deed: deed.name)
def test_short_reads(deed, tmp_path):
    if deed.name == "export":
        pytest.skip("its name for the run is drawn anew each time")
    assert not disks.short(deed, tmp_path).harm


@pytest.mark.parametrize(
    "work", [partial(disks.filling, SAVE, 3), partial(disks.read_only, SAVE)], ids=["full", "read-only"]
)
def test_small_disks(work, tmp_path):
    try:
        trouble = work(tmp_path)
    except PermissionError:
        pytest.skip("mounting is not allowed here")
    assert trouble.tried and not trouble.harm


def test_a_clock_that_jumps(tmp_path):
    assert not disks.jumps(SAVE, 3, 0, tmp_path).harm


def test_two_at_once(tmp_path):
    trouble = disks.together(lambda here, which: save(here, "new", overwrite=False), shelf.lay, 5, tmp_path / "a", 2)
    assert trouble.done == 10 and not trouble.harm


def test_two_at_once_without_hard_links(tmp_path):
    """Between the look whether the name is free and the renaming there is time here for the other one."""
    there = os.path.lexists

    def slowly(path):
        seen = there(path)
        time.sleep(0.05 if Path(path).parent.name == "Lora" else 0)
        return seen

    def work(here, which):
        with mock.patch.object(os.path, "lexists", slowly), mock.patch.object(os, "link", kills.no_links):
            return save(here, "new", overwrite=False)

    trouble = disks.together(work, shelf.lay, 3, tmp_path / "a", 2)
    assert trouble.done == 6 and not trouble.harm
    assert len(list((tmp_path / "a" / "n0" / "Lora").glob("new*.safetensors"))) == 2


def test_a_file_that_changes_while_it_is_read(tmp_path):
    trouble = disks.spoiled(3, 0, tmp_path)
    assert trouble.tried == 15 and not trouble.harm


# --- what was found ---------------------------------------------------------------------------------------------


def test_the_order_of_jobs_is_not_the_clocks(tmp_path, monkeypatch):
    queue = Queue(tmp_path, ["true"])
    monkeypatch.setattr(queue, "_run_lane", lambda lane: None)
    times = iter([5e9, 1.0, 3e9])
    monkeypatch.setattr(time, "time", lambda: next(times, 2.0))
    for number in range(3):
        queue.submit("make", str(number), {})
    assert [job.title for job in queue.jobs()] == ["0", "1", "2"]
    assert queue._next("work").title == "0"
    queue.jobs()[0].started = 4e9
    assert queue.jobs()[0].view()["seconds"] == 0
    queue.close()


def test_parts_of_the_dead_go_and_those_of_the_living_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "STALE_AFTER", 0.05)
    said = tmp_path / "said"

    def hold():
        with atomic.locked_temp_file(tmp_path) as part, atomic.locked_temp_folder(tmp_path) as folder:
            part.write_bytes(b"half")
            (folder / "half").write_bytes(b"half")
            time.sleep(60)
        return 0

    pid = shelf.forked(hold, said)
    while len(list(tmp_path.glob(".i2l-*.part/half"))) < 1:
        time.sleep(0.01)
    time.sleep(0.1)
    atomic.remove_stale(tmp_path)
    assert len(list(tmp_path.glob(".i2l-*.part"))) == 2, "a living process holds them"
    os.kill(pid, signal.SIGKILL)
    shelf.ended(pid)
    atomic.remove_stale(tmp_path)
    assert not list(tmp_path.glob(".i2l-*"))


def test_a_clock_set_back_does_not_keep_parts(tmp_path):
    part = tmp_path / ".i2l-0123456789abcdef.part"
    part.touch()
    os.utime(part, (time.time() + 1e8, time.time() + 1e8))
    atomic.remove_stale(tmp_path)
    assert not part.exists()


def test_an_export_appears_at_once(tmp_path):
    deed = DEEDS["export"]
    deed.lay(tmp_path)
    assert deed.do(tmp_path) == 0
    assert not shelf.left(tmp_path)
    from i2l_ext.converters.export import export
    from i2l_ext.converters.lora import Lora

    with pytest.raises(UserError, match="exists already"):
        export(Lora.read(tmp_path / "big.safetensors"), "diffusers", 2, tmp_path / "training", stem="big")
