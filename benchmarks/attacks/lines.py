"""The JSON lines between the engine and the WebUI, in both directions, and the small files of our own."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from starlette.responses import JSONResponse

from attacks import headers
from attacks.bytes import damaged
from attacks.judge import Flaw, unclear
from i2l_ext.converters.errors import UserError
from i2l_ext.encoders.cache import EmbeddingCache
from i2l_ext.engine import records
from i2l_ext.engine.job import ENDED
from i2l_ext.engine.queue import Queue
from i2l_ext.models import store
from i2l_ext.requests import PROTOCOL
from i2l_ext.service.settings import SETTINGS, SettingsFile
from i2l_ext.webui.api import job_view
from i2l_ext.worker import main

EVENTS: Sequence[dict[str, Any]] = (
    {"event": "plan", "steps": [{"id": "a", "title": "start"}, {"id": "b", "title": "decode", "bytes": 1000}]},
    {"event": "step", "step": "b", "share": 0.5, "cached": ["a"]},
    {"event": "note", "text": "Two keys were left out."},
    {"event": "done", "result": {"file": "a.safetensors", "rank": 4, "picture": "data:,"}},
    {"event": "failed", "error": "The disk is full.", "code": "disk_full"},
    {"event": "cancelled"},
)
ODD = (
    None,
    True,
    0,
    -1,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\0\x1b[2J",
    "x" * 5000,
    [],
    [[]],
    {},
    {"a": [1]},
    ["steps"],
    "plan",
    [0, "0", None],
    [{"id": 7, "title": 7, "bytes": -1}],
    [{"bytes": "many"}],
    [10**6],
    -0.5,
    "\ud800",
)
"""What may stand where something else should."""


def twisted(random: Random, value: Any) -> Any:
    """A JSON value with one thing in it replaced, taken away or added."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        copy, key = dict(value), random.choice(list(value))
        draw = random.random()
        if draw < 0.15:
            copy.pop(key)
        elif draw < 0.25:
            copy[random.choice(("event", "kind", "outcome", "x", ""))] = random.choice(ODD)
        else:
            copy[key] = twisted(random, value[key])
        return copy
    if isinstance(value, list) and value and random.random() < 0.6:
        copy, index = list(value), random.randrange(len(value))
        copy[index] = twisted(random, value[index])
        return copy
    return random.choice(ODD)


def _lines(random: Random) -> bytes:
    said = []
    for _ in range(random.choice((1, 2, 4, 8))):
        event = random.choice(EVENTS)
        raw = json.dumps(twisted(random, event) if random.random() < 0.7 else event).encode()
        draw = random.random()
        if draw < 0.2:
            raw = damaged(random, raw)
        elif draw < 0.22:
            raw = b"[" * random.choice((100, 100_000)) + raw
        elif draw < 0.23:
            raw = b'{"event": "' + b"x" * (5 << 20) + b'"}'
        elif draw < 0.27:
            raw += random.choice((b"\0", b"\xff\xfe", b"\r", b"\n\n", b'{"event":"done"}'))
        said.append(raw)
    return b"\n".join(said) + random.choice((b"\n", b"\n", b""))


def start_events(folder: Path) -> tuple[Callable[[Random], bytes], Callable[[Path, bytes], None]]:
    """What an engine says, into the WebUI's queue: the engine is `cat`."""
    script = folder.parent / "said"
    queue = Queue(folder.parent / "jobs", ["cat", str(script)])

    def feed(box: Path, data: bytes) -> None:
        script.write_bytes(data)
        job = queue.submit(("make", "inspect", "look")[len(data) % 3], "attack", {})
        queue.wait(job.id, 10)
        if job.state not in ENDED or not queue._lanes[job.lane].is_alive():
            raise Flaw(f"the job is {job.state}")
        shown = JSONResponse(job_view(job)).body
        if json.loads(shown)["state"] != job.state:
            raise Flaw("shown otherwise")
        for _ in range(100):  # the record is written under the lock of the queue, maybe a moment later
            with suppress(OSError, ValueError):
                if records.read_job(queue.folder / f"{job.id}.json").state == job.state:
                    break
            threading.Event().wait(0.01)
        else:
            raise Flaw("the record on disk says otherwise")
        if not 0 <= job.total <= 1:
            raise Flaw(f"{job.total} of it is done")

    return _lines, feed


def start_requests(folder: Path) -> tuple[Callable[[Random], bytes], Callable[[Path, bytes], None]]:
    """What a WebUI asks, into the engine: a fork of this process for each request."""
    torch.set_num_threads(1)
    os.environ["MPLCONFIGDIR"] = str(folder.parent / "matplotlib")
    import matplotlib.pyplot  # so that the forks need not  # noqa: F401

    import i2l_ext.pipeline  # noqa: F401

    good, picture = folder / "good.safetensors", folder / "picture.bin"
    good.write_bytes(headers.loras(folder)[-1])
    from PIL import Image

    Image.linear_gradient("L").save(picture, "PNG")
    make_request = {
        "pictures": [str(picture)],
        "weights": [1.0],
        "name": "style",
        "folder": "BOX/out",
        "model": "mini",
        "strength": 1.0,
        "rank": None,
        "dtype": None,
        "key_format": "webui",
        "description": "",
        "activation_text": "",
        "host": None,
    }
    output, options = "BOX/out.safetensors", {"device": "cpu", "memory": "2GB", "cache_bytes": 0}
    asked = (
        ("make", make_request),
        ("look", {"pictures": [str(picture)]}),
        ("inspect", {"file": str(good)}),
        ("models", {}),
        ("verify", {"model": "mini"}),
        ("download", {"model": "no-such-model", "source": "huggingface"}),
        ("convert", {"file": str(good), "key_format": "kohya", "output": output}),
        ("export", {"file": str(good), "trainer": "diffusers", "rank": 2, "output": "BOX/out"}),
        ("repair", {"file": str(good), "consumer": "musubi-tuner", "output": output, "folder": "BOX/out"}),
    )

    def make(random: Random) -> bytes:
        kind, request = random.choice(asked)
        message: Any = {"protocol": PROTOCOL, "kind": kind, "request": request, "options": options, "draw": False,
                        "outcome": "BOX/in.json", "folder": "BOX/in"}  # fmt: skip
        if random.random() < 0.9:
            message = twisted(random, message)
        raw = json.dumps(message).encode()
        return (damaged(random, raw).replace(b"\n", b" ") if random.random() < 0.15 else raw) + b"\n"

    return make, feed_request


def feed_request(box: Path, data: bytes) -> None:
    """Raises UserError where the engine refuses in one line, Flaw where it does anything but that or the work."""
    said, warned = box / "in.said", box / "in.warned"
    (box / "in").mkdir()
    outbound, inbound = os.pipe()
    pid = os.fork()
    if pid == 0:
        _engine(outbound, inbound, said, warned)
    os.close(outbound)
    with suppress(BrokenPipeError):
        os.write(inbound, data.replace(b"BOX", str(box).encode()))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(inbound)
    if "Traceback" in (text := warned.read_text(errors="replace")):
        raise Flaw(text[-500:])
    last = json.loads(said.read_bytes().splitlines()[-1])
    if last["event"] not in ENDED or code != int(last["event"] == "failed"):
        raise Flaw(f"it ended with {code} and {str(last)[:200]}")
    if last["event"] == "failed":
        if flaw := unclear(last["error"]):
            raise Flaw(flaw[1])
        raise UserError(last["error"])


def _engine(stdin: int, keep: int, said: Path, warned: Path) -> None:
    """The engine's main on one request, in a fork. It does not return."""
    try:
        os.close(keep)
        os.chdir(said.parent / "in")
        os.dup2(stdin, 0)
        for path, stream in ((said, 1), (warned, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        sys.stdout = sys.stderr
        code = main.main()
    except BaseException:  # noqa: BLE001 - it is a finding, and the fork must end here
        import traceback

        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    os._exit(code)


RECORD = {
    "id": "0123456789abcdef",
    "kind": "make",
    "title": "a",
    "state": "running",
    "created": 1.0,
    "started": 2.0,
    "ended": None,
    "result": None,
    "error": None,
    "code": None,
    "hint": None,
    "tail": [],
}
"""A job as it is kept on disk."""


def start_records(folder: Path) -> tuple[Callable[[Random], Any], Callable[[Path, Any], None]]:
    """Files that we wrote ourselves, and that a disk or another program has damaged since."""
    texts: dict[str, Any] = {
        "record": RECORD,
        "outcome": EVENTS[2],
        "settings": {setting.key: setting.default for setting in SETTINGS},
        "sidecar": {"sha256": "0" * 64, "size": 4, "mtime_ns": 1, "source": "huggingface"},
    }
    cache = EmbeddingCache(folder / "cache", 1 << 20)
    cache.put("ab", torch.arange(12.0))
    entry = (folder / "cache" / "ab.safetensors").read_bytes()
    (folder / "cache" / "ab.safetensors").unlink()

    def make(random: Random) -> tuple[str, bytes]:
        kind = random.choice((*texts, "cache"))
        if kind == "cache":
            return kind, damaged(random, entry, random.choice((1, 2)))
        raw = json.dumps(twisted(random, texts[kind])).encode()
        return kind, damaged(random, raw) if random.random() < 0.4 else raw

    def feed(box: Path, given: tuple[str, bytes]) -> None:
        kind, data = given
        if kind in ("record", "outcome"):
            old = box / "in" / "1-old"
            old.mkdir(parents=True)
            (old / "lock").touch()
            (old / "0123456789abcdef.json").write_bytes(data if kind == "record" else json.dumps(RECORD).encode())
            (old / "0123456789abcdef.outcome.json").write_bytes(data if kind == "outcome" else b"")
            queue = Queue(box / "in", ["true"])
            for job in queue.jobs():
                JSONResponse(job_view(job))
            queue.close()
            if list((box / "in").iterdir()):
                raise Flaw("old records were left")
        elif kind == "settings":
            file = box / "in.json"
            file.write_bytes(data)
            values = SettingsFile(file).read()
            if any(type(values[one.key]) is not type(one.default) for one in SETTINGS if one.default != 2):
                raise Flaw(f"{values}")
        elif kind == "sidecar":
            file = box / "in.safetensors"
            file.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
            store.note_path(file).write_bytes(data)
            store.files_identity([file])
        else:
            file = cache._path("ab")
            file.write_bytes(data)
            found = cache.get("ab")
            if found is not None and not torch.equal(found, torch.arange(12.0)):
                raise Flaw("a damaged entry was taken")
            file.unlink(missing_ok=True)

    return make, feed
