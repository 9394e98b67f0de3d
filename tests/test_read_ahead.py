"""Model files are read into the page cache while torch is imported, and while an encoder computes."""

import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from i2l_ext import embed, images
from i2l_ext.encoders.cache import EmbeddingCache
from i2l_ext.mini.sampler import SAMPLES
from i2l_ext.models import catalogue, store
from i2l_ext.weights import file_reader, read_ahead
from i2l_ext.weights import files as tensor_files
from i2l_ext.weights.compute import ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.read_ahead import PIECE, ReadAhead
from i2l_ext.weights.stream import stream


def wait_until(done):
    limit = time.monotonic() + 20
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.setattr(read_ahead, "available_memory", lambda: 1 << 34)
    return ReadAhead()


def read_of(reader, path):
    with path.open("rb") as stream:
        return reader.opened(stream.fileno())


def test_files_are_read_one_after_the_other_and_no_more_than_memory_allows(tmp_path, reader, monkeypatch):
    first, second, missing = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    first.write_bytes(bytes(3 * PIECE // 2))
    second.write_bytes(bytes(9 * PIECE))
    monkeypatch.setattr(read_ahead, "available_memory", lambda: 16 * PIECE)
    reader.begin([missing, first, second])
    wait_until(lambda: sum(reader._read.values()) >= 3 * PIECE)
    time.sleep(0.1)
    assert read_of(reader, first) == 3 * PIECE // 2
    assert read_of(reader, second) == 2 * PIECE  # a quarter of the memory in all, in whole pieces


def test_nothing_is_read_ahead_where_the_memory_is_not_known(tmp_path, reader, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(bytes(PIECE))
    monkeypatch.setattr(read_ahead, "available_memory", lambda: None)
    reader.begin([path])
    time.sleep(0.1)
    assert read_of(reader, path) == 0


def test_reading_ends_when_a_file_of_the_group_is_opened_and_only_then(tmp_path, reader, monkeypatch):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(bytes(64 * PIECE))
    monkeypatch.setattr(read_ahead, "PIECE", 4096)  # so slow that it does not come to an end
    reader.begin(paths[:1])
    wait_until(lambda: reader._read)
    assert read_of(reader, paths[2]) == 0  # one of another group: it goes on
    before = dict(reader._read)
    wait_until(lambda: reader._read != before)
    read_of(reader, paths[0])
    time.sleep(0.05)
    before = dict(reader._read)
    time.sleep(0.1)
    assert reader._read == before
    assert sum(before.values()) < 64 * PIECE


def test_what_was_read_ahead_is_taken_from_the_page_cache_and_the_rest_is_not(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    tensors = {name: torch.randn(4 << 18) for name in "abcd"}
    save_file(tensors, path)
    ahead = ReadAhead()
    monkeypatch.setattr(tensor_files, "READ_AHEAD", ahead)
    monkeypatch.setattr(tensor_files, "exceeds_page_cache", lambda size: True)
    status = path.stat()
    half = path.stat().st_size // 2
    ahead._read[status.st_dev, status.st_ino] = half
    direct = []
    whole = file_reader._read_pages
    monkeypatch.setattr(
        file_reader,
        "_read_pages",
        lambda number, start, end, area: direct.append(start) or whole(number, start, end, area),
    )
    with TensorFiles([path]) as files:
        groups = [{name: name} for name in tensors]
        for name, found in zip(tensors, stream(files, groups, ComputeOptions(dtype="float32")), strict=True):
            assert torch.equal(found[name], tensors[name])
        readable = files.readers[files.files[0]].can_read_directly
    assert not readable or (direct and min(direct) + 4096 > half - 4 * (4 << 18))
    assert len(direct) <= 3


def test_encoders_are_read_ahead_only_where_the_cache_lacks_a_picture(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(embed.READ_AHEAD, "begin", lambda paths: begun.append([path.name for path in paths]))
    model = catalogue.find("mini")
    files = store.require(model)
    paths = sorted(SAMPLES.glob("*.png"))[:3]
    pictures = [images.open_image(path, sizes=model.views) for path in paths]
    cache = EmbeddingCache(tmp_path / "cache")
    encoders, heads = ["siglip2.safetensors", "dinov3.safetensors"], ["style_core.safetensors"]
    embed.read_encoders_ahead(pictures[:2], model, files, cache)
    embed.embed(pictures[:2], model, files, cache=cache)
    assert begun == [encoders, heads]
    embed.read_encoders_ahead(pictures[:2], model, files, cache)
    embed.embed(pictures[:2], model, files, cache=cache)
    assert begun == [encoders, heads]
    embed.read_encoders_ahead(pictures, model, files, cache)
    embed.read_encoders_ahead(pictures, model, files)
    assert begun == [encoders, heads, encoders, encoders]


def test_a_make_begins_to_read_before_torch_is_imported(tmp_path):
    code = f"""
import sys
from i2l_ext.weights.read_ahead import READ_AHEAD
begin = READ_AHEAD.begin
READ_AHEAD.begin = lambda paths: print("begins", len(paths), "torch" in sys.modules) or begin(paths)
from i2l_ext.commands.main import main
main(["make", {str(SAMPLES / "candy.png")!r}, "--model", "mini", "--name", "a", "--lora-dir", {str(tmp_path)!r}])
"""
    environment = {"I2L_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("begins")]
    assert lines == ["begins 2 False", "begins 1 True"], ran.stderr
    assert (tmp_path / "a.safetensors").exists()
