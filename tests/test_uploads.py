"""Uploads as Windows takes them: a clock that ticks seldom, and files that cannot be replaced while they are read."""

import hashlib
import os
import threading
import time
from io import BytesIO
from pathlib import Path

import pytest

from i2l_ext.converters.errors import UserError
from i2l_ext.service.uploads import Uploads


class Slow(BytesIO):
    """It gives nothing before the others have begun as well."""

    def __init__(self, data, barrier):
        super().__init__(data)
        self.barrier = barrier

    def read(self, size=-1):
        if not self.tell():
            self.barrier.wait(5)
        return super().read(size)


def test_uploads_within_one_tick_of_the_clock(tmp_path, monkeypatch):
    for name in ("monotonic_ns", "time_ns"):
        monkeypatch.setattr(time, name, lambda: 42)
    uploads, barrier, found = Uploads(tmp_path / "uploads"), threading.Barrier(4), []
    pictures = [bytes([number]) * 1000 for number in range(4)]
    threads = [
        threading.Thread(target=lambda data=data: found.append(uploads.take_stream(Slow(data, barrier))))
        for data in pictures
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(hashlib.sha256(data).hexdigest() for data in pictures)
    assert sorted(path.read_bytes() for path in uploads.folder.iterdir()) == pictures


def test_a_picture_that_comes_again_while_the_engine_reads_it(tmp_path, monkeypatch):
    uploads, replace = Uploads(tmp_path / "uploads"), Path.replace

    def as_windows(self, target):
        if Path(target).exists():
            raise PermissionError(13, "Access is denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", as_windows)
    id = uploads.take_stream(BytesIO(b"one"))
    os.utime(uploads.folder / id, (1, 1))
    assert uploads.take_stream(BytesIO(b"one")) == id
    [kept] = uploads.folder.iterdir()
    assert kept.read_bytes() == b"one" and kept.stat().st_mtime > time.time() - 60, "it counts as used"


def test_a_folder_that_takes_no_picture(tmp_path, monkeypatch):
    def refused(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refused)
    (tmp_path / "a").write_bytes(b"one")
    uploads = Uploads(tmp_path / "uploads")
    with pytest.raises(UserError, match="could not be taken in"):
        uploads.take(tmp_path / "a")
    assert not list(uploads.folder.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path, monkeypatch):
    uploads = Uploads(tmp_path / "uploads")
    uploads.take_stream(BytesIO(b"one"))
    (uploads.folder / ".i2l-0123456789abcdef.part").write_bytes(b"half a picture")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    uploads.take_stream(BytesIO(b"two"))
    assert len(list(uploads.folder.iterdir())) == 2
