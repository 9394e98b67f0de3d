"""``i2l models`` and ``i2l cache`` as a user runs them, in processes of their own where the environment matters."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import randbytes
from types import SimpleNamespace

import pytest
import torch

from hubs import FakeHub
from i2l_ext.commands import models
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import WritePlan, write
from i2l_ext.encoders.cache import EmbeddingCache
from i2l_ext.models import catalogue
from test_store import SHAPES, TINY, save

ROOT = Path(__file__).parent.parent
FILE = "Some/Repo-1.0/sub/model.safetensors"
LARGE = {"weight": (25_000_000 // 2,)}
"""More than two of the pieces in which Hugging Face's client writes."""

PROGRAM = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
from i2l_ext.commands import main, models
from test_store_command import stand_in
main.COMMANDS = (models,)
stand_in(sys.argv[1])
sys.exit(main.main(sys.argv[2:]))
"""


def stand_in(which: str) -> None:
    """A catalogue of one model, whose only part is small or large."""
    part = TINY if which == "tiny" else replace(TINY, spec=SimpleNamespace(shapes=LARGE), structure_md5=None)
    model = replace(catalogue.MODELS["qwen-image-style"], name="m", siglip2=part, dinov3=part, experts=())
    catalogue.MODELS.clear()
    catalogue.MODELS["m"] = model


@pytest.fixture
def hub():
    made = FakeHub()
    yield made
    made.close()


@pytest.fixture
def environment(hub, tmp_path):
    places = {name: str(tmp_path / name) for name in ("I2L_MODELS", "I2L_CACHE", "MODELSCOPE_HOME", "MODELSCOPE_CACHE")}
    places |= {
        "XDG_DATA_HOME": str(tmp_path / "user"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": hub.url,
        "MODELSCOPE_ENDPOINT": hub.url,
    }
    return {**os.environ, **places, "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def i2l(environment, tmp_path):
    def run(which: str, *words: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, which, *words], env={**environment, **env}, cwd=tmp_path,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


def add(hub, shapes) -> bytes:
    import io

    stream = io.BytesIO()
    size = {key: 2 * int(torch.Size(shape).numel()) for key, shape in shapes.items()}
    write(
        stream, [WritePlan(key, "BF16", shape, lambda key=key: [randbytes(size[key])]) for key, shape in shapes.items()]
    )
    return hub.add("Some/Repo-1.0", "sub/model.safetensors", stream.getvalue())


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_download_from_a_mirror(hub, i2l, tmp_path, source):
    content = add(hub, SHAPES)
    done = i2l("tiny", "models", "download", "m", "--yes", "--from", source)
    path = tmp_path / "I2L_MODELS" / FILE
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path}\n" and path.read_bytes() == content
    assert "Licence: Apache-2.0" in done.stderr
    assert f"to download from {source} into {path.parents[3]}" in done.stderr
    again = i2l("tiny", "models", "download", "m", "--yes", "--offline")
    assert again.returncode == 0 and "all its weights are here" in again.stderr


def test_to_another_folder(hub, i2l, tmp_path):
    add(hub, SHAPES)
    done = i2l("tiny", "models", "download", "m", "--yes", "--to", "else where")
    assert done.returncode == 0 and (tmp_path / "else where" / FILE).exists()
    assert f"I2L_MODELS={tmp_path / 'else where'}" in done.stderr
    found = i2l("tiny", "models")
    assert str(tmp_path / "else where" / FILE) in found.stdout, "and it is found there from now on"
    assert found.stdout.endswith(f"Downloads go to {tmp_path / 'I2L_MODELS'}\n")
    where = tmp_path / "user" / "i2l" / "folders.json"
    for damaged in ("{half", "[7]", "{}", "[" * 10**5):
        where.write_text(damaged)
        assert "not here" in i2l("tiny", "models").stdout


def test_nobody_to_ask(hub, i2l):
    done = i2l("tiny", "models", "download", "m")
    assert done.returncode == 1 and done.stdout == "" and hub.seen == []
    assert len(done.stderr.splitlines()) == 1 and "--yes" in done.stderr and "Apache-2.0" in done.stderr


@pytest.mark.parametrize("how", ["--offline", "HF_HUB_OFFLINE"])
def test_offline(hub, i2l, tmp_path, how):
    done = i2l("tiny", "models", "download", "m", "--yes", *([how] if how[0] == "-" else []), **{how: "1"})
    assert done.returncode == 1 and hub.seen == []
    assert len(done.stderr.splitlines()) == 1 and "offline" in done.stderr
    assert f"are missing: {FILE}" in done.stderr and done.stderr.endswith(f"into {tmp_path / 'I2L_MODELS'}.\n")


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_person_is_asked(hub, environment, tmp_path, answer):
    add(hub, SHAPES)
    ours, theirs = pytest.importorskip("pty").openpty()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "tiny", "models", "download", "m"], env=environment, cwd=tmp_path,
        stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        os.write(ours, f"{answer}\n".encode())
        _, said = process.communicate(timeout=120)
    assert "Do you agree" in said
    assert (process.returncode == 0) == (answer == "y") == (tmp_path / "I2L_MODELS" / FILE).exists()


def test_errors_are_one_line(hub, i2l):
    hub.statuses["look"] = [404]
    done = i2l("tiny", "models", "download", "m", "--yes")
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("i2l: huggingface did not deliver sub/model.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="signals as Unix has them")
@pytest.mark.parametrize("end", [getattr(signal, "SIGKILL", signal.SIGTERM), signal.SIGINT])
@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_run_that_is_stopped_is_taken_up(hub, i2l, environment, tmp_path, source, end):
    content = add(hub, LARGE)
    hub.cuts, hub.stalling = [15_000_000], True
    words = ["large", "models", "download", "m", "--yes", "--from", source]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        path = tmp_path / "I2L_MODELS" / FILE
        deadline = time.monotonic() + 60
        while not any(part.stat().st_size > 9_000_000 for part in path.parent.glob(".*.part")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(end)
        # The hub stalls for ever: whoever waited for it would not end. (No tighter bound: test machines are busy.)
        assert process.wait(timeout=120) == (130 if end == signal.SIGINT else -end)
        assert "Traceback" not in process.stderr.read()
    assert not path.exists()
    hub.stalling = False
    hub.stall.set()
    hub.seen.clear()
    done = i2l(*words)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == content
    (again,) = hub.fetched()
    assert int(again.removeprefix("bytes=").removesuffix("-")) > 9_000_000


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The same in this process."""
    for name in ("I2L_MODELS", "I2L_CACHE", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    model = replace(catalogue.MODELS["qwen-image-style"], name="m", siglip2=TINY, dinov3=TINY, experts=())
    monkeypatch.setattr(catalogue, "MODELS", {"m": model})
    return tmp_path / "I2L_MODELS" / FILE


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    models.register(parser.add_subparsers(required=True))
    args = parser.parse_args(words)
    return args.run(args)


def test_the_table(small, capsys):
    assert run("models") == 0 and "not here" in capsys.readouterr().out
    save(small)
    assert run("models") == 0
    table = capsys.readouterr().out
    assert "m: " in table and "(ready)" in table and str(small) in table


def test_the_list_for_programs(small, capsys):
    save(small)
    assert run("models", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert {"name", "arch", "parts", "ready", "download_bytes"} <= row.keys() and row["ready"] is True
    assert {"id", "parameters", "structure_md5", "present", "path", "bytes"} <= row["parts"][0].keys()
    assert row["parts"][0]["parameters"] == 36 and row["parts"][0]["structure_md5"] == TINY.structure_md5


def test_verify(small, capsys):
    assert run("models", "verify") == 0 and capsys.readouterr().out == "tiny: not here\n"
    save(small)
    assert run("models", "verify", "m") == 0
    assert "OK: structure (no checksum is known)" in capsys.readouterr().out
    save(small, {**SHAPES, "head.bias": (5,)})
    with pytest.raises(UserError, match="cannot be used"):
        run("models", "verify")
    assert "'head.bias' has the shape [5]" in capsys.readouterr().out


def test_the_cache(small, capsys):
    EmbeddingCache.default().put("ab", torch.zeros(4))
    assert run("cache", "show", "--json") == 0
    held = json.loads(capsys.readouterr().out)
    assert held["entries"] == 1 and held["bytes"] > 16
    assert run("cache", "clear") == 0 and "deleted 1" in capsys.readouterr().out
    assert run("cache", "show") == 0 and "holds 0" in capsys.readouterr().out
