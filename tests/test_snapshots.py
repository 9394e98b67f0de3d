"""What is seen from outside, held against stored snapshots: commands, their help, the HTTP interface, the engine.

Code may be moved about as long as these stay. Where a change is meant, write them anew, and read what git then shows:

    pytest tests/test_snapshots.py --renew-snapshots

What differs from machine to machine and from day to day is replaced by a word in capitals: paths, times, versions,
hashes of weights, what the host has. Floats may differ by a thousandth.
"""

import argparse
import difflib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import torch
from PIL import Image

from i2l_ext import __version__
from i2l_ext.commands import main
from i2l_ext.converters import Lora
from i2l_ext.converters.architectures import MINI, QWEN_IMAGE
from i2l_ext.converters.key_formats import KEY_FORMATS
from i2l_ext.converters.trainers import TRAINERS
from i2l_ext.requests import PROTOCOL

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOTS = Path(__file__).resolve().with_name("snapshots")

WORDS = (
    (r"data:image/(\w+);base64,[A-Za-z0-9+/=]+", r"data:image/\1;base64,PICTURE"),
    (rf"(?<![\d.]){re.escape(__version__)}(?![\d.])", "VERSION"),
    (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?", "DATE"),
    (r"\b\d+(\.\d+)? s\b", "SECONDS s"),
    (r"(_i2l_r\d+_)[0-9a-f]{6}\b", r"\1HASH"),
    (r"\b(\d+\.\d)\d*%", r"\1%"),
    (r"\(choose from .*\) \(", "(choose from …) ("),
)
"""Pattern in any text -> what stands for it. (argparse lists choices otherwise in every other Python.)"""

HEX = r"\b(0x)?[0-9a-f]{32,64}\b"
"""A hash of weights, whose last bits differ from processor to processor; but not of the published structures."""


@pytest.fixture
def hold(request, tmp_path):
    """Hold a value against the snapshot of a name, or store it."""

    def check(name, seen, *, hashes=True):
        path = SNAPSHOTS / f"{name}.json"
        words = [(re.escape(str(tmp_path)), "TMP"), (re.escape(str(ROOT)), "ROOT"), *WORDS, *([(HEX, "HASH")] * hashes)]
        seen = plain(seen, words)
        if request.config.getoption("--renew-snapshots"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(seen), encoding="utf-8")
        assert path.is_file(), f"{name}: nothing is stored yet; --renew-snapshots stores it"
        stored = json.loads(path.read_text(encoding="utf-8"))
        lines = [text(value).splitlines() for value in (stored, settled(seen, stored))]
        if changes := list(difflib.unified_diff(*lines, "stored", "seen", n=2, lineterm="")):
            pytest.fail(f"{name} is another than before:\n" + "\n".join(changes), pytrace=False)

    return check


def text(value):
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def plain(value, words):
    """A JSON value with words in the place of what varies."""
    if isinstance(value, str):
        for pattern, word in words:
            value = re.sub(pattern, word, value)
        return value
    if isinstance(value, dict):
        return {key: "SECONDS" if key == "seconds" else plain(one, words) for key, one in value.items()}
    return [plain(one, words) for one in value] if isinstance(value, list) else value


def settled(seen, stored):
    """``seen``, with the stored float wherever it is as good as equal."""
    if isinstance(seen, float) and isinstance(stored, float):
        return stored if math.isclose(seen, stored, rel_tol=1e-3, abs_tol=1e-3) else seen
    if isinstance(seen, dict) and isinstance(stored, dict):
        return {key: settled(one, stored.get(key)) for key, one in seen.items()}
    if isinstance(seen, list) and isinstance(stored, list) and len(seen) == len(stored):
        return list(map(settled, seen, stored))
    return seen


# --- the commands -------------------------------------------------------------------------------------------------

MAKE = "make picture.png --lora-dir Lora --model mini --precision fp32"

COMMANDS = {
    "make": f"{MAKE} --name style --json",
    "make-text": f"{MAKE} --name style",
    "make-options": f"{MAKE.replace('.png', '.png pictures/10.png')} --name a.b --weights 1 2 --rank 2 --to kohya "
                    "--dtype fp16 --strength 0.5 --kinds attn --description said --activation-text painted "
                    "--host forge-neo --no-cache --json",
    "make-each": "make pictures --each --lora-dir Lora --model mini --precision fp32 --json",
    "make-no-picture": "make none.png --name style --lora-dir Lora --model mini --json",
    "make-bad-name": f"{MAKE} --name a/b --json",
    "inspect": "inspect mini.safetensors --json",
    "inspect-text": "inspect mini.safetensors",
    "inspect-header": "inspect qwen.safetensors --header --json",
    "inspect-plot": "inspect mini.safetensors --plot plot.png --json",
    "inspect-broken": "inspect broken.safetensors --json",
    "check": "check mini.safetensors --json",
    "check-text": "check qwen.safetensors",
    "check-qwen": "check qwen.safetensors --json",
    **{f"convert-{key_format}": f"convert mini.safetensors --to {key_format} --json" for key_format in KEY_FORMATS},
    "convert-parts": "convert qwen.safetensors --to kohya --kinds attn --dtype bf16 -o out.safetensors --json",
    "convert-text": "convert qwen.safetensors --to diffusers",
    "convert-taken": "convert mini.safetensors --to kohya -o qwen.safetensors --json",
    "rank-lower": "rank mini.safetensors --rank 2 --json",
    "rank-effect": "rank mini.safetensors --effect-kept 0.6 -o out.safetensors --json",
    "rank-per-module": "rank mini.safetensors --rank 2 --per-module --exact -o out.safetensors --json",
    "rank-grow": "rank mini.safetensors --rank 6 --seed 1 --json",
    "rank-text": "rank mini.safetensors --rank 2",
    "merge": "merge mini.safetensors:0.7 mini.safetensors:0.3 --json",
    "merge-rank": "merge mini.safetensors mini.safetensors:-0.5 --rank 3 --to diffusers -o out.safetensors --json",
    "merge-strangers": "merge mini.safetensors qwen.safetensors --json",
    **{f"export-{trainer}": f"export qwen.safetensors --for {trainer} --json" for trainer in TRAINERS},
    **{f"export-{trainer}-mini": f"export mini.safetensors --for {trainer} --rank 6 -o out --json"
       for trainer in TRAINERS},
    "export-text": "export qwen.safetensors --for diffusers",
    "models": "models --json",
    "models-text": "models",
    "models-verify": "models verify",
    "models-verify-mini": "models verify mini",
    "models-download": "models download qwen-image-style",
    "models-download-offline": "models download qwen-image-style --offline",
    "models-download-mini": "models download mini",
    "models-unknown": "models verify none",
    "doctor": "doctor --json",
    "cache-show": "cache show --json",
    "cache-show-text": "cache show",
    "cache-clear": "cache clear --json",
    "draw": "draw --prompt star --seed 1 --size 64 -o out.png",
    "draw-lora": "draw --lora mini.safetensors:0.5 --grid 0,1 --size 64 -o out.png",
    "draw-unknown-word": "draw --prompt horse -o out.png",
    "usage-no-command": "",
    "usage-unknown": "conjure",
    "usage-no-argument": "convert --json",
    "version": "--version",
}  # fmt: skip
"""Name of the snapshot -> what is typed, in a folder with the files of ``shelf``."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Pictures and LoRAs, always the same."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "pictures").mkdir()
    for number, name in enumerate(("picture.png", "pictures/2.png", "pictures/10.png")):
        grey = Image.effect_mandelbrot((160, 120 + 20 * number), (-2, -1, 1, 1), 20)
        Image.merge("RGB", [grey, grey.rotate(90), Image.new("L", grey.size, 60)]).save(folder / name)
    block = [path for path in QWEN_IMAGE.i2l_modules if path.startswith("transformer_blocks.7.")]
    for name, arch, paths, rank in (("mini", MINI, list(MINI.i2l_modules), 4), ("qwen", QWEN_IMAGE, block, 2)):
        generator = torch.Generator().manual_seed(0)
        pairs = {}
        for path in paths:
            d_out, d_in = arch.modules[path].shape
            pairs[path] = (torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
        Lora.of(arch, pairs, {"ss_output_name": name}).save(folder / f"{name}.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\xff" * 64)
    return folder


@pytest.fixture
def place(shelf, tmp_path, monkeypatch):
    """A folder with these files and nothing of the machine's: the commands run in it."""
    from huggingface_hub import constants

    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    for name in ("I2L_MODELS", "I2L_CACHE", "MODELSCOPE_CACHE", "DIFFSYNTH_MODEL_BASE_PATH", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "HF_HUB_CACHE"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["i2l"])
    return tmp_path


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def written(path):
    """What others read of a file."""
    if path.suffix == ".safetensors":
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        metadata = header.pop("__metadata__", None)
        tensors = [f"{name} {entry['dtype']} {entry['shape']}" for name, entry in sorted(header.items())]
        return {"tensors": len(tensors), "first": tensors[:3], "last": tensors[-1:], "metadata": metadata}
    if path.name.endswith(".preview.png"):
        return list(Image.open(path).size)
    if path.suffix in (".json", ".sh", ".yaml", ".toml", ".py"):
        return path.read_text(encoding="utf-8").splitlines()
    return None


def parsed(out):
    """JSON as such, lines of JSON as a list, anything else line by line."""
    lines = out.splitlines()
    for read in (lambda: json.loads(out), lambda: [json.loads(line) for line in lines]):
        try:
            return read()
        except ValueError:
            pass
    return lines


def of_the_host(told):
    """The facts of ``i2l doctor`` without their values, but for the models."""
    return {name: value if name.startswith("model ") else "HOST" for name, value in told.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, hold, place, capsys):
    before = files(place)
    try:
        code = main.main(COMMANDS[name].split())
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    said = parsed(out)
    new = sorted(file for file in files(place) - before if not file.startswith("I2L_CACHE/"))
    seen = {
        "command": f"i2l {COMMANDS[name]}".strip(),
        "code": code,
        "stdout": of_the_host(said) if name == "doctor" else without_sizes(said),
        "stderr": [line for line in err.splitlines() if code or line.startswith("i2l")],
        "files": {file: written(place / file) for file in new},
    }
    hold(f"commands/{name}", seen, hashes=name != "models")


def without_sizes(told):
    """Sizes of what was written differ with the length of a version in its metadata."""
    if isinstance(told, list):
        return [without_sizes(one) for one in told]
    if isinstance(told, str):
        return re.sub(r"\b\d+\.\d MB", "SIZE MB", told)
    return {key: "SIZE" if key == "bytes" and "file" in told else one for key, one in told.items()} if isinstance(
        told, dict) else told  # fmt: skip


# --- their help ---------------------------------------------------------------------------------------------------


def subcommands(parser, name="i2l"):
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from subcommands(below, f"{name} {word}")


def shape(parser):
    """The options and arguments of a parser; no prose."""
    options = []
    for action in parser._actions:
        choices, default = action.choices, action.default
        options.append({
            "names": action.option_strings or [action.dest], "metavar": action.metavar, "nargs": action.nargs,
            "choices": None if choices is None else list(choices), "required": action.required,
            "default": default.as_posix() if isinstance(default, Path) else default,
        })  # fmt: skip
    groups = [[action.option_strings for action in group._group_actions] for group in parser._mutually_exclusive_groups]
    return {"options": options, "one of": groups}


def test_help(hold):
    hold("help", {name: shape(parser) for name, parser in subcommands(main.parser())})


# --- the HTTP interface -------------------------------------------------------------------------------------------

ENGINE = """
import json, sys, time
message = json.loads(sys.stdin.readline())
def say(event, **facts): print(json.dumps({"event": event, **facts}), flush=True)
start, decode = {"id": "start", "title": "start"}, {"id": "decode", "title": "decode", "bytes": 1000, "layers": 4}
say("plan", steps=[start, decode])
say("step", step="decode", share=0.5, cached=["start"])
kind, request = message["kind"], message["request"]
if request.get("name") == "slow": time.sleep(60)
if request.get("name") == "bad":
    print("the last words", file=sys.stderr, flush=True)
    say("failed", error="It failed.", code="invalid")
elif kind == "models":
    parts = [{"id": "mini-style", "bytes": 1, "repo": None, "licence": "Apache-2.0", "present": True,
              "path": "/secret", "problem": None}]
    row = {"name": "mini", "arch": "mini", "line": "for a try", "ready": True, "download_bytes": 0, "parts": parts}
    say("done", result=[row])
elif kind == "make":
    file = request["folder"] + "/" + request["name"] + ".safetensors"
    say("done", result={"file": file, "name": request["name"], "picture": "data:image/jpeg;base64,AA", "drawn": None})
elif kind == "inspect":
    say("done", result={"file": request["file"], "arch": "mini", "plot": "data:image/png;base64,AA"})
else:
    say("done", result={"said": request})
"""
"""An engine that answers at once, so that nothing but the interface is looked at."""

PICTURE = {"files": [("pictures", ("a.png", b"picture"))]}
LORA = {"lora": "style.safetensors"}

WORK = {
    "make": ("/loras", {**PICTURE, "data": {"name": "made", "model": "mini", "weights": "[2]", "subfolder": "mine"}}),
    "make with every field": ("/loras", {**PICTURE, "data": {
        "name": "full", "model": "mini", "weights": "[1.5]", "strength": "0.5", "rank": "8", "key_format": "kohya",
        "dtype": "fp16", "subfolder": "a/b", "description": "said", "activation_text": "painted"}}),
    "a name that is taken": ("/loras", {**PICTURE, "data": {"name": "style"}}),
    "a job that fails": ("/loras", {**PICTURE, "data": {"name": "bad"}}),
    "a job that is cancelled": ("/loras", {**PICTURE, "data": {"name": "slow"}}),
    "inspect": ("/inspect", {"json": LORA}),
    "convert": ("/convert", {"json": {**LORA, "to": "diffusers"}}),
    "export": ("/export", {"json": {**LORA, "trainer": "diffusers", "rank": 8}}),
}  # fmt: skip

REFUSED = {
    "no form": ("POST", "/loras", {"data": {"name": "x"}}),
    "no picture": ("POST", "/loras", {"files": [("other", b"x")], "data": {"name": "x"}}),
    "an unknown field": ("POST", "/loras", {**PICTURE, "data": {"name": "x", "folder": "/"}}),
    "a field of another type": ("POST", "/loras", {**PICTURE, "data": {"name": "x", "rank": "many"}}),
    "a model that is none": ("POST", "/loras", {**PICTURE, "data": {"name": "x", "model": "none"}}),
    "no name": ("POST", "/loras", PICTURE),
    "a LoRA that is not there": ("POST", "/inspect", {"json": {"lora": "none.safetensors"}}),
    "a key format that is none": ("POST", "/convert", {"json": {**LORA, "to": "none"}}),
    "a trainer that is none": ("POST", "/export", {"json": {**LORA, "trainer": "none", "rank": 1}}),
    "a rank out of range": ("POST", "/export", {"json": {**LORA, "trainer": "diffusers", "rank": 0}}),
    "other fields": ("POST", "/inspect", {"json": {}}),
    "no JSON": ("POST", "/inspect", {"content": b"{", "headers": {"content-type": "application/json"}}),
    "another type": ("POST", "/inspect", {"content": b"{}", "headers": {"content-type": "text/plain"}}),
    "too long": ("POST", "/inspect", {"json": {"lora": "x" * (1 << 17)}}),
    "a job that is none": ("GET", "/loras/none", {}),
    "no such method": ("PUT", "/loras", {}),
    "no credentials": ("GET", "/loras", {"auth": ("me", "wrong")}),
    "another site": ("GET", "/loras", {"headers": {"origin": "http://other.example"}}),
}


@pytest.fixture
def client(tmp_path):
    pytest.importorskip("httpx")
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    from i2l_ext.service.service import Service
    from i2l_ext.webui import api
    from i2l_ext.webui.hosts.standalone import StandaloneHost

    host = StandaloneHost(tmp_path / "state", lora_folder=tmp_path / "Lora", serves_api=True)
    host.lora_folder().mkdir(parents=True)
    (host.lora_folder() / "style.safetensors").write_bytes(b"x")
    service = Service(host, tmp_path / "state", [sys.executable, "-S", "-c", ENGINE])
    app = Starlette()
    api.add_api(app, service, [("me", "secret")])
    client = TestClient(app, base_url="http://localhost/i2l/v1")
    client.auth, client.service, client.routes = ("me", "secret"), service, app.router.routes
    yield client
    service.queue.close()


def answered(answer):
    names = ("cache-control", "x-content-type-options", "www-authenticate")
    headers = {name: answer.headers[name] for name in names if name in answer.headers}
    body = parsed(answer.text) if answer.text.startswith(("{", "[")) else answer.text
    return {"status": answer.status_code, "headers": headers, "body": job_of(body)}


def job_of(body):
    """A job without what differs from one to the next."""
    if isinstance(body, list):
        return [job_of(one) for one in body]
    times = {"id": "ID", "created": "TIME", "started": "TIME", "ended": "TIME"}
    return {key: times[key] if key in times and one else one for key, one in body.items()} if isinstance(
        body, dict) else body  # fmt: skip


def test_http(hold, client):
    seen = {"routes": sorted(f"{' '.join(sorted(route.methods - {'HEAD'}))} {route.path}" for route in client.routes)}
    client.service.models.rows()
    client.service.queue.wait(client.service.queue.jobs()[0].id, 60)
    seen["models"] = answered(client.get("/models"))
    for name, (path, options) in WORK.items():
        answer = client.post(path, **options)
        assert answer.status_code == 202, (name, answer.text)
        id = answer.json()["id"]
        if "cancelled" in name:
            while not client.service.queue.find(id).total:
                time.sleep(0.02)
            assert client.delete(f"/loras/{id}").status_code == 202
        client.service.queue.wait(id, 60)
        seen[name] = answered(client.get(f"/loras/{id}"))
        assert answer.json().keys() == seen[name]["body"].keys()
    seen["jobs"] = [[job["kind"], job["title"], job["state"]] for job in client.get("/loras").json()]
    for name, (method, path, options) in REFUSED.items():
        seen[name] = answered(client.request(method, path, **options))
    hold("http", seen)
    hold("openapi", client.get("/openapi.json").json())


# --- the engine ---------------------------------------------------------------------------------------------------

OPTIONS = {"device": "cpu", "cache_bytes": 10**9}
MAKE = {
    "pictures": ["TMP/picture.png", "TMP/pictures/2.png"], "weights": [1.0, 2.0], "name": "style", "folder": "TMP/Lora",
    "model": "mini", "strength": 1.0, "rank": None, "dtype": None, "key_format": "webui", "description": "said",
    "activation_text": "",
}  # fmt: skip
REPAIRED = {"output": "TMP/repaired.safetensors", "folder": "TMP/training"}

REQUESTS = {
    "make": MAKE,
    "look": {"pictures": ["TMP/picture.png", "TMP/broken.safetensors"], "numbers": [2, 5]},
    "inspect": {"file": "TMP/mini.safetensors"},
    "curve": {"file": "TMP/mini.safetensors"},
    "repair": {"file": "TMP/mini.safetensors", "consumer": "musubi-tuner", **REPAIRED},
    "convert": {"file": "TMP/mini.safetensors", "key_format": "kohya", "output": "TMP/out.safetensors"},
    "export": {"file": "TMP/qwen.safetensors", "trainer": "musubi-tuner", "output": "TMP/out"},
    "models": {},
    "doctor": {"host": "Forge Neo"},
    "verify": {"model": "mini"},
    "download": {"model": "mini", "agreed": True},
    "inspect-broken": {"file": "TMP/broken.safetensors"},
    "unknown": {},
    "strange": {"file": "relative"},
}
KINDS = {"inspect-broken": "inspect", "unknown": "conjure", "strange": "inspect"}
"""Name of the snapshot, and kind of the job unless KINDS says another."""


def events(out):
    """What the engine says; of the reports on one step the first, as their number is a matter of speed."""
    told = []
    for event in map(json.loads, out.splitlines()):
        if event["event"] == "step":
            event["share"] = "SHARE"
            if told and told[-1] == event:
                continue
        told.append(event)
    return told


@pytest.mark.parametrize("name", REQUESTS)
def test_engine(name, hold, place):
    job = place / "job"
    job.mkdir()
    asked = {"protocol": PROTOCOL, "kind": KINDS.get(name, name), "request": REQUESTS[name], "options": OPTIONS}
    message = {**asked, "folder": str(job), "outcome": str(place / "outcome.json")}
    line = json.dumps(message).replace("TMP/", f"{place}/")
    engine = subprocess.Popen(
        [sys.executable, "-m", "i2l_ext.worker.main"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    engine.stdin.write(line + "\n")
    engine.stdin.flush()  # and it stays open: its end would mean "stop"
    out = engine.stdout.read()
    code = engine.wait(60)
    engine.stdin.close()
    told = events(out)
    outcome = place / "outcome.json"
    kept = outcome.exists() and json.loads(outcome.read_text(encoding="utf-8")) == json.loads(out.splitlines()[-1])
    if name == "doctor":
        lines = [re.split(r"\s{2,}", line, maxsplit=1) for line in told[-1]["result"]["text"].splitlines()]
        told[-1]["result"] = of_the_host(dict(lines))
    if isinstance(told[-1].get("result"), dict):
        told[-1]["result"] = without_sizes(told[-1]["result"])
    seen = {"message": asked, "code": code, "events": told, "kept as outcome": kept}
    hold(f"engine/{name}", seen, hashes=name != "models")


def test_there_are_no_others():
    known = {f"commands/{name}" for name in COMMANDS} | {f"engine/{name}" for name in REQUESTS}
    stored = {path.relative_to(SNAPSHOTS).with_suffix("").as_posix() for path in SNAPSHOTS.rglob("*.json")}
    assert stored == known | {"help", "http", "openapi"}
