"""LoRA folders that take no file: a clear word, and nothing left behind."""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from i2l_ext import library
from i2l_ext.converters.errors import UserError
from shelf import listing, save, triple

ROOT = Path(__file__).resolve().parents[1]


def test_a_file_for_a_folder(tmp_path):
    (tmp_path / "Lora").write_text("I am a file")
    for folder in (tmp_path / "Lora", tmp_path / "Lora" / "deeper"):
        for refused in (save, library.check_folder):
            with pytest.raises(UserError, match="it is a file, not a folder"):
                refused(folder)
    assert listing(tmp_path) == ["Lora"]


def test_check_folder(tmp_path):
    library.check_folder(tmp_path / "new" / "Lora", 1000)
    assert listing(tmp_path) == []
    with pytest.raises(UserError, match="the disk is full"):
        library.check_folder(tmp_path, 1 << 60)


@pytest.mark.skipif(os.name == "nt", reason="uids of POSIX")
def test_an_unwritable_folder():
    with tempfile.TemporaryDirectory() as name:
        shelf = Path(name) / "Lora"
        shelf.mkdir()
        shelf.chmod(0o555)
        Path(name).chmod(0o755)
        root = os.geteuid() == 0  # whom no mode stops
        try:
            if root:
                os.seteuid(65534)
            for folder in (shelf, shelf / "new"):
                for refused in (save, library.check_folder):
                    with pytest.raises(UserError, match="writing is not allowed"):
                        refused(folder)
        finally:
            if root:
                os.seteuid(0)
        assert listing(shelf) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that takes no file from anyone is Linux's")
def test_a_folder_that_is_none_of_the_users():
    with pytest.raises(UserError, match="Cannot write to /proc/self"):
        save("/proc/self/i2l")


def test_a_full_disk(tmp_path):
    """A real one, where this process may mount it."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("not allowed to mount a small disk")
    try:
        save(tmp_path)
        for overwrite in (False, True):
            with pytest.raises(UserError, match="the disk is full"):
                save(tmp_path, write=lambda path, stem: path.write_bytes(bytes(1 << 20)), overwrite=overwrite)
        assert listing(tmp_path) == triple("style")
        assert (tmp_path / "style.safetensors").read_bytes() == b"lora style"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_file_too_large_for_its_disk(tmp_path):
    import resource

    code = """
    import sys
    from PIL import Image
    from i2l_ext import library
    from i2l_ext.converters.errors import UserError
    try:
        library.save_lora(sys.argv[1], "style", lambda path, stem: path.write_bytes(bytes(1 << 20)),
                     preview=Image.new("RGB", (4, 4)), sidecar={})
    except UserError as error:
        print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
        capture_output=True,
        text=True,
    )
    assert "does not take a file so large" in run.stdout, run.stderr
    assert listing(tmp_path) == []
