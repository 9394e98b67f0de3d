"""kill -9 at any moment: of a make, a conversion, an export, a download and a training run, in forks of a process that
has everything loaded; and of the engine and the WebUI as they really are."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import yaml
from PIL import Image

from attacks import shelf
from i2l_ext.commands.main import main

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Deed:
    """What is killed. ``lay(folder)`` prepares a folder; ``do(folder)`` gives an exit code; ``may_change(name)``: files
    that it may replace; ``again``: a killed one goes on in the same folder, else it does it all anew."""

    name: str
    lay: Callable[[Path], object]
    do: Callable[[Path], int]
    may_change: Callable[[str], bool] = lambda name: False
    again: bool = False


@dataclass
class Toll:
    """Kills of a deed: how many were tried, met a living process, met it while files were on their way; what was
    wrong afterwards."""

    tried: int = 0
    met: int = 0
    writing: int = 0
    harm: list[str] = field(default_factory=list)


def kill(deed: Deed, times: int, seed: int, folder: Path) -> Toll:
    """``times`` kills at random moments, every second one while files are on their way, as far as they are seen. After
    each the folder is held against what it was, and the deed is done to its end in it, without cleaning."""
    random, toll = Random(f"{seed} {deed.name}"), Toll()
    said = folder.parent / f"{deed.name}.said"
    deed.lay(folder)
    start = time.monotonic()
    if code := shelf.ended(shelf.forked(partial(deed.do, folder), said)):
        raise RuntimeError(f"{deed.name} ends with {code} undisturbed: {said.read_text()[-800:]}")
    whole = time.monotonic() - start
    fresh = iter(range(1_000_000))
    here = folder.with_name(f"{deed.name}-{next(fresh)}")
    deed.lay(here)
    for number in range(times):
        before = shelf.state(here)
        pid = shelf.forked(partial(deed.do, here), said)
        if number % 2:
            _await_parts(here, pid, whole * 2)
            time.sleep(random.uniform(0, 0.02))
        else:
            time.sleep(random.uniform(0, whole))
        ended, status = os.waitpid(pid, os.WNOHANG)
        alive = not ended
        toll.harm += [f"run {number} ends by itself with {status}"] if status else []
        toll.tried += 1
        if alive:
            os.kill(pid, signal.SIGKILL)
            toll.met += 1
            shelf.ended(pid)
            toll.writing += bool(shelf.left(here))
        toll.harm += [f"kill {number}: {found}" for found in shelf.harm(before, here, deed.may_change)]
        if deed.again and alive and number + 1 < times:
            continue
        toll.harm += [f"after kill {number}: {found}" for found in _next(deed, here, said)]
        here = folder.with_name(f"{deed.name}-{next(fresh)}")
        deed.lay(here)
    return toll


def _next(deed: Deed, here: Path, said: Path) -> list[str]:
    """What is wrong with the run after a kill."""
    before = shelf.state(here)

    def again() -> int:
        shelf.at_once()
        return deed.do(here)

    code = shelf.ended(shelf.forked(again, said))
    found = [] if code == 0 else [f"ends with {code}: {said.read_text()[-300:]}"]
    return found + shelf.harm(before, here, deed.may_change) + [f"{name} was left" for name in shelf.left(here)]


def _await_parts(folder: Path, pid: int, longest: float) -> None:
    end = time.monotonic() + longest
    while time.monotonic() < end and not shelf.left(folder):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.001)


def steps(deed: Deed, folder: Path, most: int = 1000) -> Toll:
    """Killed by itself before each of its steps on the disk in turn: opening, linking, renaming, removing, making a
    folder. No moment between two of them is left out."""
    toll, said = Toll(), folder.parent / f"{deed.name}-steps.said"
    for number in range(most):
        here = folder.with_name(f"{deed.name}-step-{number}")
        deed.lay(here)
        before = shelf.state(here)
        code = shelf.ended(shelf.forked(partial(_until, deed, here, number), said))
        toll.tried += 1
        toll.met += code == -signal.SIGKILL
        toll.writing += bool(shelf.left(here))
        toll.harm += [f"step {number}: {found}" for found in shelf.harm(before, here, deed.may_change)]
        if code == 0:
            return toll
        if code != -signal.SIGKILL:
            toll.harm.append(f"step {number} ends with {code}: {said.read_text()[-300:]}")
        toll.harm += [f"after step {number}: {found}" for found in _next(deed, here, said)]
    return toll


DISK = frozenset({"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"})


def _until(deed: Deed, here: Path, number: int) -> int:
    """Do it until its step of that number within the folder, and die there."""
    waiting = number

    def hear(event: str, args: tuple[Any, ...]) -> None:
        nonlocal waiting
        if event in DISK and args and str(here) in str(args[0]):
            if waiting == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            waiting -= 1

    sys.addaudithook(hear)
    return deed.do(here)


# --- the deeds --------------------------------------------------------------------------------------------------


def _lay_make(folder: Path) -> None:
    shelf.lay(folder)
    Image.effect_mandelbrot((96, 80), (-2, -1, 1, 1), 20).convert("RGB").save(folder / "photo.png")


def _make(folder: Path, *more: str) -> int:
    words = ("make", folder / "photo.png", "--name", "style", "--lora-dir", folder / "Lora", "--model", "mini")
    return main([*map(str, words), "--no-cache", "--json", *more])


def _convert(folder: Path) -> int:
    source, target = folder / "Lora" / "old.safetensors", folder / "Lora" / "style.safetensors"
    return main(["convert", str(source), "--to", "kohya", "-o", str(target), "--overwrite"])


def _lay_export(folder: Path) -> None:
    shelf.lay(folder)
    shelf.lora(folder / "big.safetensors", "z-image")


def _export(folder: Path) -> int:
    words = ("export", folder / "big.safetensors", "--for", "diffusers", "--rank", "2", "-o", folder / "training")
    return 0 if (folder / "training").exists() else main(list(map(str, words)))


def no_links(*args: object, **options: object) -> None:
    """os.link, as exFAT, many network shares and some mounts of a container have it."""
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def linkless(deed: Deed) -> Deed:
    """The same on a disk without hard links."""

    def do(folder: Path) -> int:
        with mock.patch.object(os, "link", no_links):
            return deed.do(folder)

    return replace(deed, name=f"{deed.name}, no links", do=do)


def is_style(name: str) -> bool:
    return name.startswith("Lora/style.")


def deeds() -> list[Deed]:
    """Those that need nothing but this machine's processor."""
    made = [Deed("make", _lay_make, _make), Deed("make over an old one", _lay_make, partial(_make_over), is_style)]
    return [
        *made,
        *map(linkless, made),
        Deed("convert over an old one", shelf.lay, _convert, is_style),
        Deed("export", _lay_export, _export),
    ]


def _make_over(folder: Path) -> int:
    return _make(folder, "--overwrite")


def training() -> Deed:
    """A run of a few steps: its next one goes on where it was killed."""

    def lay(folder: Path) -> None:
        raw = yaml.safe_load((ROOT / "configs" / "train" / "mini.yaml").read_text())
        raw.update(output=str(folder / "run"), lanes=1, precision="no", experts=raw["experts"][:1])
        raw["data"] = {"kind": "world", "styles": 6, "contents": 3}
        raw["foundations"] = {
            name: {"steps": 2, "batch": 2} for name in ("base", "siglip2", "dinov3", "qwen_vl", "judge")
        }
        raw["foundations"]["pictures"] = 16
        for expert in raw["experts"]:
            expert["schedule"] = {"steps": 4, "batch": 2, "log_every": 1, "save_every": 1}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "small.yaml").write_text(yaml.safe_dump(raw))

    def own(name: str) -> bool:
        return name.startswith("run/")

    return Deed("training", lay, lambda folder: main(["train", str(folder / "small.yaml")]), own, again=True)


@contextmanager
def downloading(size: int = 12_000_000) -> Iterator[Deed]:
    """From a hub on this machine."""
    from huggingface_hub import constants

    from attacks.headers import HEADS
    from hubs import FakeHub
    from i2l_ext.converters.files import WritePlan, write
    from i2l_ext.models.download import download
    from i2l_ext.models.hubs import HuggingFace

    constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
    hub = FakeHub()
    part = replace(HEADS, structure_md5=None)
    stream = BytesIO()
    write(stream, [WritePlan("noise", "U8", (size,), lambda: [Random(0).randbytes(size)])])
    hub.add(part.repo, part.files[0], stream.getvalue())

    def do(folder: Path) -> int:
        return 0 if download([part], HuggingFace(endpoint=hub.url), folder / "models") else 1

    def lay(folder: Path) -> None:
        shelf.lora(folder / "models" / "attack" / "heads" / "neighbour.safetensors")

    try:
        yield Deed("download", lay, do, again=True)
    finally:
        hub.close()


# --- as they really are -----------------------------------------------------------------------------------------


def engines(times: int, seed: int, folder: Path) -> Toll:
    """The engine's own process, killed at a random moment of a make that a queue asked for; the next job is done."""
    from i2l_ext.engine.queue import Queue

    random, toll = Random(f"{seed} engine"), Toll()
    _lay_make(folder)
    queue = Queue(folder / "jobs", environment=lambda: {"OMP_NUM_THREADS": "1"})
    request = {"pictures": [str(folder / "photo.png")], "name": "style", "folder": str(folder / "Lora"),
               "model": "mini"}  # fmt: skip
    options = {"device": "cpu", "cache_bytes": 0}
    whole = 0.0
    for number in range(-1, times):
        before = shelf.state(folder / "Lora")
        start = time.monotonic()
        job = queue.submit("make", "style", {"request": {**request, "overwrite": True}, "options": options})
        if number < 0:
            whole = _until_done(queue, job.id, start)
            continue
        time.sleep(random.uniform(0, whole))
        engine = queue._engines.get(job.id)
        toll.tried += 1
        if engine is not None:
            with suppress(ProcessLookupError):
                engine.process.kill()
                toll.met += 1
        ended = queue.wait(job.id, 60)
        toll.writing += bool(shelf.left(folder / "Lora"))
        if ended.state == "failed" and "signal 9" not in str(ended.error):
            toll.harm.append(f"kill {number}: {ended.error}")
        toll.harm += shelf.harm(before, folder / "Lora", lambda name: name.startswith("style."))
    _until_done(queue, queue.submit("make", "style", {"request": request, "options": options}).id, 0)
    queue.close()
    return toll


def _until_done(queue: Any, id: str, start: float) -> float:
    job = queue.wait(id, 300)
    if job.state != "done":
        raise RuntimeError(f"{job.error} {job.tail}")
    return time.monotonic() - start


def webuis(times: int, seed: int, folder: Path) -> Toll:
    """The stand-alone WebUI, killed at a random moment of a make: its engine ends by itself, the next server knows of
    the job, and nothing half-written lies there."""
    from attacks.server import Server

    random, toll = Random(f"{seed} webui"), Toll()
    _lay_make(folder)
    for number in range(times):
        before = shelf.state(folder / "Lora")
        with Server(folder) as server:
            if number and not any(
                job["state"] in ("done", "failed", "cancelled") for job in server.get("/loras").json()
            ):
                toll.harm.append(f"kill {number}: the next server does not know of the job")
            server.make(folder / "photo.png", f"made-{number}")
            time.sleep(random.uniform(0, 8))
            engines = server.children()
            server.kill()
            toll.tried += 1
            toll.met += 1
            toll.writing += bool(shelf.left(folder / "Lora"))
        end = time.monotonic() + 40
        while time.monotonic() < end and any(Path(f"/proc/{pid}/exe").exists() for pid in engines):
            time.sleep(0.1)
        toll.harm += [f"kill {number}: its engine {pid} lives" for pid in engines if Path(f"/proc/{pid}/exe").exists()]
        toll.harm += [f"kill {number}: {found}" for found in shelf.harm(before, folder / "Lora", lambda name: False)]
        toll.harm += [f"kill {number}: {name} was left" for name in shelf.left(folder / "Lora")]
    return toll
