"""Reading where the calls of Linux are missing, or the disk is slow, far away, or gives less than was asked for."""

import io
import os
import sys
import threading
import time
from contextlib import closing

import pytest
import torch

from i2l_ext.converters import files as tensor_files
from i2l_ext.converters.errors import UserError
from i2l_ext.weights import file_reader
from i2l_ext.weights.compute import ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.stream import stream
from slow_disks import PREADV, SYSTEMS, SlowDisk, system
from small_encoders import save

needs_preadv = pytest.mark.skipif(PREADV is None, reason="the emulation reads with preadv itself")
FP32 = ComputeOptions(dtype="float32")
MB = 1 << 20


@pytest.fixture
def file(tmp_path):
    """Three groups of 4 MB, and their file, whose tensors lie at no page's start."""
    tensors = {f"g{i}": torch.randn(MB + 3, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    return tensors, save(tmp_path / "x.safetensors", tensors)


def read(path, tensors):
    with TensorFiles([path]) as files:
        for name, group in zip(tensors, stream(files, [{"t": name} for name in tensors], FP32), strict=True):
            assert torch.equal(group["t"], tensors[name])


@needs_preadv
@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("most", [None, 4096 * 100, 300_007])
def test_every_value_arrives_and_nothing_is_read_twice(file, kind, most, monkeypatch):
    tensors, path = file
    monkeypatch.setattr("i2l_ext.weights.reads.READ_SIZE", MB)
    disk = SlowDisk(most=most)
    with system(kind, disk):
        read(path, tensors)
    disk.calls = [call for call in disk.calls if call[0] + call[1] > 4096]  # without the header
    whole = sum(tensor.nbytes for tensor in tensors.values())
    # past the page cache whole pages are read: at most one more at both ends of each of twelve or more reads
    assert whole <= disk.given <= whole + (2 * file_reader.PAGE * 20 if "past" in kind else 0)


@needs_preadv
def test_a_disk_that_refuses_is_asked_once_and_no_more(file, monkeypatch):
    """Each reader may have asked before it knew of the other's answer."""
    tensors, path = file
    monkeypatch.setattr("i2l_ext.weights.reads.READ_SIZE", MB // 4)
    asked, plain = [], file_reader._read_pages
    monkeypatch.setattr(file_reader, "_read_pages", lambda *given: asked.append(1) or plain(*given))
    with system("past it refused", SlowDisk()):
        read(path, tensors)
    assert 1 <= len(asked) <= 2


@needs_preadv
def test_readers_wait_for_a_far_disk_at_the_same_time(file, monkeypatch):
    """As a share that answers after 20 ms: two questions are on their way, whatever the system."""
    tensors, path = file
    monkeypatch.setattr("i2l_ext.weights.reads.READ_SIZE", MB // 2)
    waiting, sleep, lock = [0], time.sleep, threading.Lock()
    most = []

    def seen(seconds):
        with lock:
            waiting[0] += seconds == 0.02
            most.append(waiting[0])
        sleep(seconds)
        with lock:
            waiting[0] -= seconds == 0.02

    monkeypatch.setattr("slow_disks.time.sleep", seen)
    for kind in SYSTEMS:
        most.clear()
        with system(kind, SlowDisk(latency=0.02)):
            read(path, tensors)
        assert max(most) == 2, kind


@needs_preadv
@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_file_cut_short_is_named_on_every_system(file, kind):
    tensors, path = file
    with system(kind, SlowDisk()), TensorFiles([path]) as files:
        os.truncate(path, path.stat().st_size - 5 * MB)
        with closing(stream(files, [{"t": name} for name in tensors], FP32)) as groups:
            with pytest.raises(UserError, match=r"x\.safetensors: the file (became shorter|changed) while it was read"):
                list(groups)


@pytest.mark.parametrize("other", ["win32", "darwin"])
def test_other_systems_get_what_they_have(other, file, monkeypatch):
    """No direct reads, no large pages, no hint to the disk: the same bytes."""
    tensors, path = file
    was = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", other)
        for name in ("O_DIRECT", "posix_fadvise", "POSIX_FADV_DONTNEED"):
            patch.delattr(os, name, raising=False)
        buffer = file_reader.page_buffer(10_000)
        assert len(buffer) == 10_000 and buffer.data_ptr() % file_reader.PAGE == 0
        assert file_reader._reopen_direct(0) is None
        patch.setattr("i2l_ext.weights.files.exceeds_page_cache", lambda size: True)
        read(path, tensors)
        written = io.BytesIO()
        tensor_files.write(written, [tensor_files.WritePlan.of(name, t) for name, t in tensors.items()])
    assert written.getvalue() == was


def test_a_system_without_proc_keeps_all_in_its_cache(monkeypatch):
    monkeypatch.setattr(file_reader.Path, "read_text", lambda path: (_ for _ in ()).throw(FileNotFoundError()))
    assert not file_reader.exceeds_page_cache(1 << 60)
