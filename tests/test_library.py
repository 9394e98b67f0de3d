"""The LoRA folder: free names, labels, and that files appear whole or not at all."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from PIL import Image

from i2l_ext import images
from i2l_ext.converters import atomic
from i2l_ext.converters.architectures import ARCHITECTURES
from i2l_ext.converters.errors import UserError
from i2l_ext.library import folder as library
from i2l_ext.library import metadata
from i2l_ext.library.collage import collage
from shelf import NOTE, PREVIEW, listing, save, triple, write

ROOT = Path(__file__).resolve().parents[1]


# --- names that are free ----------------------------------------------------------------------------------------


def test_fresh_names(tmp_path):
    assert library.fresh_name(tmp_path / "missing", "style") == "style"
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for taken, expected in [
        ("style.safetensors", "style-2"),
        ("deep/er/STYLE-2.safetensors", "style-3"),
        ("Style-3.json", "style-4"),
        ("style-4.preview.png", "style-5"),
        ("style-5.txt", "style-5"),
        ("style-5.safetensors/", "style-6"),
    ]:
        path = tmp_path / taken
        path.mkdir() if taken.endswith("/") else path.touch()
        assert library.fresh_name(tmp_path, "style") == expected
    long = "x" * 100
    (tmp_path / f"{long}.safetensors").touch()
    assert library.fresh_name(tmp_path, long) == "x" * 98 + "-2"


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_folders_behind_links_count_and_loops_end(tmp_path):
    shelf, elsewhere = tmp_path / "Lora", tmp_path / "disk2"
    shelf.mkdir()
    elsewhere.mkdir()
    (elsewhere / "style.safetensors").touch()
    (shelf / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(shelf)
    assert library.fresh_name(shelf, "style") == "style-2"


# --- where, and what is said ------------------------------------------------------------------------------------


def test_find_lora_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkout = tmp_path / "webui" / "extensions" / "i2l"
    checkout.mkdir(parents=True)
    assert library.find_lora_folder(checkout) is None
    (tmp_path / "webui" / "models").mkdir()
    assert library.find_lora_folder(checkout) == tmp_path / "webui" / "models" / "Lora"
    assert library.find_lora_folder(tmp_path / "src" / "i2l") is None
    (tmp_path / "models" / "Lora").mkdir(parents=True)
    assert library.find_lora_folder(tmp_path / "src" / "i2l") == Path("models/Lora")


def test_sd_version():
    assert metadata.sd_version("qwen-image", "forge-neo") == "qwen"
    assert metadata.sd_version("z-image", "forge-neo") == "zit"
    for arch, host in (("qwen-image", ""), ("z-image", "a1111"), ("mini", "forge-neo")):
        assert metadata.sd_version(arch, host) == "Unknown"


@pytest.mark.parametrize(
    ("arch_id", "card"),
    [("qwen-image", "qwen"), ("z-image", "zimage"), ("flux2-klein-4b", "f2"), ("hidream-o1", ""), ("mini", "")],
)
def test_sd_next_names_the_model_on_the_card(arch_id, card):
    """By the beginning of ``ss_base_model_version``, or klein in it (058a7f0, modules/lora/network.py)."""
    rules = {"sd_v1": "sd1", "sdxl": "xl", "sd3": "sd3", "flux2": "f2", "flux": "f1", "hunyuan_video": "hv",
             "chroma": "chroma", "zimage": "zimage", "anima": "anima", "qwen": "qwen"}  # fmt: skip
    said = metadata.lora_metadata("s", arch_id=arch_id, model="m", rank=8, images=[])
    base = said.get("ss_base_model_version", "")
    assert next((word for start, word in rules.items() if base.startswith(start)), "") == card
    assert not base.startswith("sdxl_"), "A1111 and Forge would take it for SDXL's"


@pytest.mark.parametrize("arch_id", [arch.id for arch in ARCHITECTURES.values() if arch.i2l_modules])
def test_metadata(arch_id):
    made = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    pictures = [{"sha256": "ab" * 32, "weight": 0.5, "name": "secret-folder/grandma.jpg"}]
    said = metadata.lora_metadata(
        "style-2", arch_id=arch_id, model="m", rank=8, images=pictures, strength=0.8, made=made, description="d"
    )
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in said.items())
    assert said["ss_output_name"] == said["modelspec.title"] == "style-2"
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("8", "8")
    assert said["modelspec.date"] == "2026-01-02T01:04:05Z"
    assert said["modelspec.architecture"].endswith("/lora")
    assert json.loads(said["i2l.images"]) == [{"sha256": "ab" * 32, "weight": 0.5}]
    assert "grandma" not in json.dumps(said) and "secret" not in json.dumps(said)
    assert (
        metadata.lora_metadata("s", arch_id=arch_id, model="m", rank=8, alpha=2.5, images=[])["ss_network_alpha"]
        == "2.5"
    )


# --- saving -----------------------------------------------------------------------------------------------------


def test_save(tmp_path):
    saved = save(tmp_path / "models" / "Lora")
    assert listing(tmp_path / "models" / "Lora") == triple("style")
    assert saved.name == "style" and saved.file.read_bytes() == b"lora style"
    assert json.loads(saved.sidecar.read_text(encoding="utf-8"))["notes"] == "Über Größe"
    assert Image.open(saved.preview).size == (16, 16)
    assert saved.file.stat().st_nlink == 1


def test_what_a_host_sees_meanwhile(tmp_path, monkeypatch):
    """Nothing while the LoRA is written; the LoRA only once its preview and its sidecar are there, and it whole."""
    seen = []

    def watched(part, path, *, overwrite):
        atomic.place(part, path, overwrite=overwrite)
        seen.append([name for name in listing(tmp_path) if not name.endswith(".part")])

    def writing(path, stem):
        write(path, stem)
        assert all(re.fullmatch(r"\.i2l-\w+\.part", name) for name in listing(tmp_path))

    monkeypatch.setattr(library, "place", watched)
    save(tmp_path, write=writing)
    assert seen == [triple("style")[:1], triple("style")[:2], triple("style")]


def test_a_second_one_takes_the_next_name(tmp_path):
    save(tmp_path)
    assert save(tmp_path).file.read_bytes() == b"lora style-2"
    assert (tmp_path / "style.safetensors").read_bytes() == b"lora style"
    assert save(tmp_path, "STYLE").name == "STYLE-3"


def test_overwrite(tmp_path):
    save(tmp_path)
    saved = save(tmp_path, write=lambda path, stem: path.write_bytes(b"new"), overwrite=True)
    assert saved.name == "style" and saved.file.read_bytes() == b"new"
    assert listing(tmp_path) == triple("style")


def test_a_preview_carries_nothing_of_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "where grandma lives"
    path = tmp_path / "p.jpg"
    PREVIEW.save(path, exif=exif, icc_profile=b"grandma's screen", comment=b"grandma")
    picture = images.open_image(path)
    saved = library.save_lora(tmp_path, "s", write, preview=collage([picture.square]), sidecar=NOTE)
    assert b"grandma" not in saved.preview.read_bytes()


def test_bad_names_write_nothing(tmp_path):
    with pytest.raises(UserError):
        save(tmp_path / "new", "../style")
    assert listing(tmp_path) == []


def test_a_folder_of_that_name(tmp_path):
    (tmp_path / "style.safetensors").mkdir()
    with pytest.raises(UserError, match=r"style\.safetensors is a folder"):
        save(tmp_path, overwrite=True)
    assert listing(tmp_path) == ["style.safetensors"]
    assert save(tmp_path).name == "style-2"


class Trip:
    """Raises at the n-th call, or just after it, of the functions that it wraps."""

    def __init__(self, error, late):
        self.error, self.late = error, late
        self.calls = self.at = 0

    def wrap(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            now = self.calls == self.at
            if now and not self.late:
                raise self.error
            result = function(*args, **kwargs)
            if now:
                raise self.error
            return result

        return call


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_whatever_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch, error, late, overwrite, links):
    """Fails at the first, second, … step of everything that touches the disk, until a save gets through."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    shelf = tmp_path / "models" / "Lora"
    if overwrite:
        save(shelf)
    before = {path: path.read_bytes() for path in shelf.glob("*")}
    trip = Trip(error, late)
    steps = (os, "fsync"), (library, "place"), (library, "_png"), (library, "_keep"), (Path, "write_text")
    with monkeypatch.context() as patched:
        for owner, name in steps:
            patched.setattr(owner, name, trip.wrap(getattr(owner, name)))
        while True:
            trip.calls, trip.at = 0, trip.at + 1
            try:
                save(shelf, write=trip.wrap(lambda path, stem: path.write_bytes(b"new")), overwrite=overwrite)
                break
            except (UserError, KeyboardInterrupt):
                assert {path: path.read_bytes() for path in shelf.glob("*")} == before
                assert overwrite or not (tmp_path / "models").exists()
    assert trip.calls == trip.at - 1 == (12 if overwrite else 9)
    assert (shelf / "style.safetensors").read_bytes() == b"new"
    assert listing(shelf) == triple("style")


def _no_links(*args, **kwargs):
    raise OSError(errno.EPERM, "no hard links here")


def test_without_hard_links_nothing_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _no_links)
    part, path = tmp_path / "a.part", tmp_path / "a"
    part.write_bytes(b"new")
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        atomic.place(part, path, overwrite=False)
    assert path.read_bytes() == b"old" and part.exists()
    assert save(tmp_path / "shelf").file.read_bytes() == b"lora style"
    assert listing(tmp_path / "shelf") == triple("style")


def test_a_name_taken_meanwhile(tmp_path):
    """Another process finishes the same name while ours is being written."""
    stems = []

    def slow(path, stem):
        stems.append(stem)
        if len(stems) == 1:
            save(tmp_path)
        write(path, stem)

    assert save(tmp_path, write=slow).file.read_bytes() == b"lora style-2"
    assert stems == ["style", "style-2"]
    assert listing(tmp_path) == sorted(triple("style") + triple("style-2"))


CHILD = """
import sys, time
from pathlib import Path
from PIL import Image
from i2l_ext import library

folder, me, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def write(path, stem):
    with path.open("wb") as stream:
        stream.write(b"half ")
        stream.flush()
        (folder.parent / f"writing-{me}").touch()
        time.sleep(pause)
        while pause == 0 and not (folder.parent / "go").exists():
            time.sleep(0.001)
        stream.write(me.encode())

saved = library.save_lora(folder, "style", write, preview=Image.new("RGB", (4, 4)), sidecar={"notes": me})
print(saved.name)
"""


def child(folder, me, pause=0.0):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(folder), me, str(pause)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_processes_at_once_each_get_a_name(tmp_path):
    shelf = tmp_path / "Lora"
    runs = [child(shelf, f"child{index}") for index in range(5)]
    for index in range(5):
        wait_for(tmp_path / f"writing-child{index}")
    (tmp_path / "go").touch()
    names = [run.communicate(timeout=30)[0].strip() for run in runs]
    assert sorted(names) == ["style", "style-2", "style-3", "style-4", "style-5"]
    assert listing(shelf) == sorted(file for name in names for file in triple(name))
    for index, name in enumerate(names):
        assert (shelf / f"{name}.safetensors").read_bytes() == b"half child%d" % index
        assert json.loads((shelf / f"{name}.json").read_text())["notes"] == f"child{index}"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_interrupted_and_killed(tmp_path, monkeypatch):
    shelf = tmp_path / "models" / "Lora"
    run = child(shelf, "a", 60)
    wait_for(tmp_path / "models" / "writing-a")
    run.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in run.communicate(timeout=30)[1]
    assert not shelf.exists()

    run = child(shelf, "b", 60)
    wait_for(tmp_path / "models" / "writing-b")
    run.kill()
    run.communicate(timeout=30)
    left = listing(shelf)
    assert left and all(re.fullmatch(r"\.i2l-\w+\.part", name) for name in left)
    assert save(shelf).name == "style"
    assert set(left) < set(listing(shelf)), "they may be a living process's"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * 24 * 3600)
    save(shelf)
    assert listing(shelf) == sorted(triple("style") + triple("style-2"))


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from i2l_ext import library, images, models; import i2l_ext.library.metadata, i2l_ext.models.store"
    )
    code += "; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
