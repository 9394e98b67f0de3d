"""Downloads from a hub on this machine through the real client libraries, and all that goes wrong on the way."""

import io
import json
import shutil
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from random import randbytes
from types import SimpleNamespace

import pytest

from hubs import COMMIT, FakeHub
from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.converters.files import WritePlan, write
from i2l_ext.models import download as downloading
from i2l_ext.models.catalogue import MODELS
from i2l_ext.models.checked_files import DownloadCallbacks, verify
from i2l_ext.models.download import download, missing
from i2l_ext.models.hubs import HUBS
from i2l_ext.models.store import Folders, files_identity, known_sha256, locate, note_path
from test_store import SHAPES, SHARDED, TINY, save, save_shards

REPO = "Some/Repo-1.0"
BIG = 3_000_000
"""Bytes: several of the client libraries' pieces, as they are set below."""


@pytest.fixture
def hub():
    made = FakeHub()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # 10 MB otherwise: what a cut throws away
    monkeypatch.setattr(downloading, "RETRY_SECONDS", 0.01)
    for name in ("MODELSCOPE_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture(params=sorted(HUBS))
def client(request, hub, monkeypatch):
    """Each client library in turn, pointed at our hub."""
    return HUBS[request.param](endpoint=hub.url)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "models"


def weights(hub, size: int = BIG):
    """A checkpoint of about ``size`` bytes on the hub, and its content."""
    shapes = {**SHAPES, "large.weight": (size // 2,)}
    part = replace(TINY, spec=SimpleNamespace(shapes=shapes), structure_md5=None)
    stream = io.BytesIO()
    plans = [
        WritePlan(key, "BF16", shape, partial(lambda n: [randbytes(2 * n)], prod(shape)))
        for key, shape in shapes.items()
    ]
    write(stream, plans)
    return part, hub.add(REPO, "sub/model.safetensors", stream.getvalue())


TEMPLATE = replace(TINY, kind="template", files=("model.py",), repo=REPO, structure_md5=None)


def test_a_template_is_fetched_by_the_exact_names_that_its_repository_lists(client, hub, folder):
    held = {name: hub.add(REPO, name, b"of " + name.encode()) for name in ("model.py", "parts/more.py", "LICENSE")}
    held["model.safetensors"] = weights(hub)[1]
    hub.add(REPO, "model.safetensors", held["model.safetensors"])
    hub.add(REPO, "assets/picture.jpg", b"not needed")
    del hub.files[REPO, "sub/model.safetensors"]
    found = download([TEMPLATE], client, folder)
    assert {path.relative_to(folder / REPO).as_posix(): path.read_bytes() for path in found} == held
    assert locate(TEMPLATE, Folders(folder)) == [folder / REPO / "model.py"]
    assert verify(TEMPLATE, found) == "checksum" or client.name == "huggingface"  # git keeps no sha256 of small files


def test_a_template_that_was_broken_off_is_not_taken_for_whole(client, hub, folder):
    """It is found by its code, which comes last."""
    hub.add(REPO, "model.py", b"# code")
    hub.add(REPO, "model.safetensors", weights(hub)[1])
    del hub.files[REPO, "sub/model.safetensors"]
    seen = []
    halfway = DownloadCallbacks(lambda phase, *_: seen.append(phase), lambda: "download model.safetensors" in seen)
    hub.cuts, hub.stalling = [100_000] * 2, True
    with pytest.raises(Cancelled):
        download([TEMPLATE], client, folder, halfway)
    assert locate(TEMPLATE, Folders(folder)) is None


@pytest.mark.parametrize(
    "name", ["../evil.py", "a/../../evil.py", "/evil.py", "C:/evil.py", "a\\..\\evil.py", ".git/hook.py"]
)
def test_a_template_whose_names_lead_out_is_not_fetched(client, hub, folder, name):
    hub.add(REPO, "model.py", b"x")
    hub.add(REPO, name, b"x")
    with pytest.raises(UserError, match="other files than a template has"):
        download([TEMPLATE], client, folder)
    assert not list(folder.rglob("*evil*")) and not (folder / REPO / "model.py").exists()


def test_a_repository_without_code_is_no_template(client, hub, folder):
    hub.add(REPO, "README.txt", b"x")
    with pytest.raises(UserError, match="lists no model"):
        download([TEMPLATE], client, folder)


def final(folder: Path) -> Path:
    return folder / REPO / "sub/model.safetensors"


def parts(folder: Path) -> list[Path]:
    return sorted(final(folder).parent.glob(".*.part")) if folder.exists() else []


def fails(part, client, folder, match: str, job: DownloadCallbacks | None = None) -> str:
    """The one line of a download that fails and leaves nothing under the final name."""
    with pytest.raises(UserError, match=match) as caught:
        download([part], client, folder, job)
    assert not final(folder).exists() and not note_path(final(folder)).exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_arrives_whole_with_its_checksum(hub, client, folder):
    part, content = weights(hub)
    seen = []
    (path,) = download([part], client, folder, DownloadCallbacks(lambda *word: seen.append(word)))
    assert path == final(folder) and path.read_bytes() == content and parts(folder) == []
    noted = json.loads(note_path(path).read_text())
    assert noted["repo"] == REPO and noted["source"] == client.name and noted["revision"] in (COMMIT, "master")
    assert known_sha256(path) == noted["sha256"] and files_identity([path])
    assert seen[-1] == ("check .model.safetensors." + noted["sha256"][:16] + ".part", len(content), len(content))
    assert verify(part, [path]) == "checksum and structure"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["model.safetensors", "model.safetensors.sha256"]


def test_found_by_the_store_and_not_fetched_again(hub, client, folder):
    content = save(folder.parent / "source.safetensors").read_bytes()
    hub.add(REPO, "sub/model.safetensors", content)
    folders = Folders(folder)
    model = replace(MODELS["qwen-image-style"], siglip2=TINY, dinov3=TINY, experts=())
    assert missing(model, folders) == [TINY]
    download([TINY], client, folder)
    assert missing(model, folders) == [] and locate(TINY, folders) == [final(folder)]
    asked = len(hub.fetched())
    assert download([TINY], client, folder) == [final(folder)]
    assert len(hub.fetched()) == asked


def test_shards_and_their_index(hub, client, folder):
    source = folder.parent / "source"
    names = [path.name for path in save_shards(source)]
    for name in (*names, "model.safetensors.index.json"):
        hub.add(REPO, f"text/{name}", (source / name).read_bytes())
    hub.add(REPO, "text/model.safetensors", b"not asked for")
    download([SHARDED], client, folder)
    assert locate(SHARDED, Folders(folder)) == [folder / REPO / "text" / name for name in names]
    assert not (folder / REPO / "text/model.safetensors").exists()


def test_a_cut_is_mended_in_the_same_run(hub, client, folder):
    part, content = weights(hub)
    hub.cuts = [1_000_000, 500_000]
    assert download([part], client, folder)[0].read_bytes() == content
    ranges = hub.fetched()
    assert len(ranges) == 3 and ranges[0] == "" and all(again.startswith("bytes=") for again in ranges[1:])


def test_the_next_run_goes_on_where_the_last_was_cut(hub, client, folder):
    part, content = weights(hub)
    hub.cuts = [1_000_000]
    hub.statuses["fetch"] = [0, 403]
    fails(part, client, folder, "it refuses")
    (half,) = parts(folder)
    kept = half.stat().st_size
    assert 900_000 < kept <= 1_000_000 and half.read_bytes() == content[:kept]
    hub.seen.clear()
    assert download([part], client, folder)[0].read_bytes() == content
    assert hub.fetched() == [f"bytes={kept}-"] and parts(folder) == []


def test_a_hub_that_cannot_start_in_the_middle(hub, client, folder):
    part, content = weights(hub)
    hub.cuts, hub.ranges = [1_000_000], False
    assert download([part], client, folder)[0].read_bytes() == content


def test_wrong_bytes_are_thrown_away(hub, client, folder):
    part, content = weights(hub)
    hub.spoiled = True
    fails(part, client, folder, "not what its checksum says")
    assert parts(folder) == []
    hub.spoiled = False
    assert download([part], client, folder)[0].read_bytes() == content


def test_a_new_version_does_not_grow_on_the_old_one(hub, client, folder):
    part, _ = weights(hub)
    hub.cuts = [1_000_000]
    hub.statuses["fetch"] = [0, 403]
    fails(part, client, folder, "it refuses")
    client = HUBS[client.name](endpoint=hub.url)
    content = hub.add(REPO, "sub/model.safetensors", bytes(BIG))
    hub.seen.clear()
    assert download([part], client, folder)[0].read_bytes() == content
    assert hub.fetched() == [""] and parts(folder) == []


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "a login"), (403, "refuses"), (404, "not have this file"), (429, "many requests"), (503, "internal error")],
)
@pytest.mark.parametrize("kind", ["look", "fetch"])
def test_refusals(hub, client, folder, status, words, kind, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client libraries wait between their own tries
    part, content = weights(hub, 10_000)
    hub.statuses[kind] = [status] * 100
    fails(part, client, folder, words)
    hub.statuses[kind].clear()
    assert download([part], client, folder)[0].read_bytes() == content


def test_asked_too_often_once(hub, client, folder, monkeypatch):
    part, content = weights(hub, 10_000)
    hub.statuses["fetch"] = [429]
    if client.name == "modelscope":
        fails(part, client, folder, "many requests")
    assert download([part], client, folder)[0].read_bytes() == content


def test_a_file_that_the_hub_has_not(hub, client, folder):
    hub.add(REPO, "another.safetensors", b"")
    fails(TINY, client, folder, "does not have")


def test_no_checksum_no_download(hub, client, folder):
    part, _ = weights(hub, 10_000)
    hub.checksums = False
    fails(part, client, folder, "checksum")
    assert hub.fetched() == []


def test_a_token_is_not_told_to_the_store(hub, folder, monkeypatch):
    part, _ = weights(hub, 10_000)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download([part], HUBS["huggingface"](endpoint=hub.url), folder)
    told = {("/bytes/" in path): headers.get("authorization") for _, path, headers in hub.seen}
    assert told == {False: "Bearer hf_secret", True: None}


def test_nobody_answers(hub, client, folder, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    part, _ = weights(hub, 10_000)
    gone = FakeHub()
    gone.close()
    fails(part, HUBS[client.name](endpoint=gone.url), folder, "the connection failed")


def test_no_room(hub, client, folder, monkeypatch):
    part, _ = weights(hub)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert "1.0 MB are free" in fails(part, client, folder, "3.0 MB are to be downloaded")
    assert hub.fetched() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full(hub, client, folder):
    part, content = weights(hub)
    hub.cuts = [1_000_000]
    hub.statuses["fetch"] = [0, 403]
    fails(part, client, folder, "it refuses")
    (half,) = parts(folder)
    kept = half.rename(half.with_name("kept"))
    half.symlink_to("/dev/full")
    fails(part, client, folder, "the disk is full")
    half.unlink()
    kept.rename(half)
    assert download([part], client, folder)[0].read_bytes() == content


def test_a_folder_that_cannot_be_made(hub, client, folder):
    part, _ = weights(hub, 10_000)
    folder.write_text("a file is in the way")
    with pytest.raises(UserError, match="cannot be written to"):
        download([part], client, folder)


def test_more_than_was_announced_is_thrown_away(tmp_path):
    path = tmp_path / "growing"
    with downloading._Sink(path, 10, threading.Event()) as sink:
        sink.write(b"8 bytes.")
        with pytest.raises(ConnectionError):
            sink.write(b"8 more..")
        assert path.read_bytes() == b"" and sink.tell() == 0
        sink.write(b"anew")
    assert path.read_bytes() == b"anew"


def test_nothing_is_overwritten(hub, client, folder):
    part, _ = weights(hub, 10_000)
    save(final(folder), fill=3)
    before = final(folder).read_bytes()
    with pytest.raises(UserError, match="Move it away"):
        download([part], client, folder)
    assert final(folder).read_bytes() == before


def test_cancel_while_the_hub_is_silent(hub, client, folder):
    part, content = weights(hub)
    hub.cuts, hub.stalling = [1_000_000], True
    said = []

    def cancelled() -> bool:
        if parts(folder) and parts(folder)[0].stat().st_size > 500_000:
            said.append(time.monotonic())
        return bool(said)

    with pytest.raises(Cancelled):
        download([part], client, folder, DownloadCallbacks(cancelled=cancelled))
    assert time.monotonic() - said[0] < 10  # the hub is silent for ever; the machine may be busy
    assert not final(folder).exists()
    hub.stalling = False
    hub.stall.set()
    deadline = time.monotonic() + 20
    while not final(folder).exists():  # the abandoned connection may hold the file for a moment
        try:
            download([part], client, folder)
        except UserError as error:
            assert "another run" in str(error) and time.monotonic() < deadline
            time.sleep(0.1)
    assert final(folder).read_bytes() == content


def test_two_at_once_do_not_spoil_each_other(hub, client, folder):
    part, content = weights(hub)
    hub.cuts, hub.stalling = [1_000_000], True
    first = threading.Thread(target=lambda: download([part], client, folder))
    first.start()
    while not parts(folder):
        time.sleep(0.01)
    fails(part, HUBS[client.name](endpoint=hub.url), folder, "by another run")
    hub.stalling = False
    hub.stall.set()
    first.join(timeout=60)
    assert final(folder).read_bytes() == content


def test_verify_sees_a_change(hub, client, folder):
    part, content = weights(hub, 10_000)
    (path,) = download([part], client, folder)
    path.write_bytes(content[:-1] + b"\0")
    with pytest.raises(UserError, match="has changed"):
        verify(part, [path])
    note_path(path).unlink()
    assert verify(part, [path]) == "structure (no checksum is known)"
    with pytest.raises(UserError, match=r"large\.weight"):
        verify(TINY, [path])


def test_a_client_that_is_not_installed(hub, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    fails(TINY, HUBS["modelscope"](endpoint=hub.url), folder, "pip install modelscope-hub")
