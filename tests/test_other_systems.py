"""What Windows and macOS do otherwise, emulated: files that are open, locks, consoles, quotes, long paths, line ends.

What cannot be emulated is listed in docs/systems.md.
"""

import errno
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from i2l_ext import library, process_tree
from i2l_ext.commands.main import main
from i2l_ext.converters import Lora, atomic
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.shell import shell_word
from i2l_ext.engine import locks
from i2l_ext.library import folder as lora_folder
from i2l_ext.operations import Context, perform, selftest
from i2l_ext.requests import DoctorRequest

fcntl = pytest.importorskip("fcntl")  # the emulations are built on it

ROOT = Path(__file__).resolve().parent.parent
CALLS = ("rename", "replace", "unlink", "remove", "link")


@pytest.fixture
def windows_disk(monkeypatch):
    """Files that this process has open can neither be renamed, replaced nor removed; there are no hard links, and no
    locks on temporary files. The paths that were refused."""
    refused = []

    def is_open(path):
        real = os.path.realpath(path)
        return any(os.path.realpath(number) == real for number in Path("/proc/self/fd").iterdir())

    def forbid(name):
        plain = getattr(os, name)

        def call(*paths, **named):
            if name == "link":
                raise OSError(errno.EOPNOTSUPP, "no links")
            if "dir_fd" not in named and any(isinstance(path, str | Path) and is_open(path) for path in paths):
                refused.append(paths)
                raise PermissionError(errno.EACCES, "The process cannot access the file", str(paths[0]))
            return plain(*paths, **named)

        monkeypatch.setattr(os, name, call)

    for name in CALLS:
        forbid(name)
    monkeypatch.setattr(atomic, "CAN_LOCK", False)
    return refused


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="which files are open is asked of Linux")
def test_no_file_is_renamed_or_removed_while_it_is_open(world, tmp_path, windows_disk, capsys):
    """Whatever writes a file or reads one, on the way that a user takes."""
    lora, folder = tmp_path / "Lora" / "it.safetensors", str(tmp_path / "Lora")
    make = ["make", str(world.pictures[0]), "--model", "small", "--lora-dir", folder, "--name", "it"]
    other, resized, merged = (str(tmp_path / f"{name}.safetensors") for name in ("other", "resized", "merged"))
    for command in (
        make,
        [*make, "--overwrite"],
        [*make[:-1], "\u00e4"],
        ["inspect", str(lora)],
        ["convert", str(lora), "--to", "kohya", "-o", other],
        ["convert", str(lora), "--to", "kohya", "-o", other, "--overwrite"],
        ["rank", str(lora), "--rank", "2", "-o", resized],
        ["merge", str(lora), resized, "-o", merged],
        ["models"],
        ["cache", "clear"],
    ):
        code = main(command)
        assert code == 0, (command, capsys.readouterr().err)
    assert not windows_disk
    assert not list(tmp_path.rglob("*.part"))


def test_a_lora_is_converted_and_resized_onto_itself(make, windows_disk):
    file = make()["file"]
    assert main(["convert", file, "--to", "kohya", "-o", file, "--overwrite"]) == 0
    assert main(["rank", file, "--rank", "2", "-o", file, "--overwrite"]) == 0
    assert Lora.read(file).rank == 2 and not windows_disk


def test_locks_of_windows_exclude_each_other(tmp_path, monkeypatch):
    """The other half of the module, on a stand-in for msvcrt: its lock is the file's, and one byte long."""
    msvcrt = ModuleType("msvcrt")
    msvcrt.LK_NBLCK = 2

    def locking(number, mode, count):
        assert (mode, count) == (2, 1)
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)

    msvcrt.locking = locking
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        windows = importlib.util.module_from_spec(importlib.util.find_spec(locks.__name__))
        windows.__spec__.loader.exec_module(windows)
    assert windows._take.__module__ == locks.__name__ and "msvcrt" in windows._take.__code__.co_names
    one, two = windows.Lock(tmp_path / "lock"), windows.Lock(tmp_path / "lock")
    assert one.acquire() and not two.acquire()
    one.release()
    assert two.acquire()


def test_a_tree_of_processes_ends_by_taskkill(monkeypatch):
    done = []
    process = SimpleNamespace(pid=4711, kill=lambda: done.append("kill"), wait=lambda: done.append("wait"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        patch.setattr(process_tree.subprocess, "run", lambda words, **_: done.append(words))
        process_tree.end_tree(process, process_tree.Tree(4711))
    assert done == [["taskkill", "/F", "/T", "/PID", "4711"], "kill", "wait"]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("C:/start/train.py", "C:/start/train.py"),
        ("C:/my start/train.py", '"C:/my start/train.py"'),
        ("C:/a&b/train.py", '"C:/a&b/train.py"'),  # & begins another command, in cmd and PowerShell
        ("C:/a(1)/train.py", '"C:/a(1)/train.py"'),
        ("C:/it's/train.py", '"C:/it\'s/train.py"'),
        ("C:/b;c,d/train.py", '"C:/b;c,d/train.py"'),
        ("//server/share/\u56fe/train.py", "//server/share/\u56fe/train.py"),
    ],
)
def test_a_path_as_the_shells_of_windows_take_it(path, word, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        assert shell_word(path) == word


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_console_without_the_letters_of_a_name(make, monkeypatch, tmp_path, encoding):
    """What it lacks becomes a question mark."""
    made = make("--name", "\u5927")
    for command in (["inspect", made["file"]], ["models"]):
        console = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\r\n")
        monkeypatch.setattr(sys, "stdout", console)
        monkeypatch.setattr(sys, "stderr", console)
        assert main(command) == 0
        console.flush()
        assert b"?" in console.buffer.getvalue() or command == ["models"]


def test_a_path_that_is_too_long_is_said_to_be(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="its path is too long"):
        library.check_folder(tmp_path / ("x" * 300))
    long = tmp_path / ("x" * 200)

    def opened(folder):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")  # what Windows says beyond 259 characters

    monkeypatch.setattr(lora_folder.atomic, "locked_temp_file", opened)
    with pytest.raises(UserError, match="too long for Windows"):
        library.check_folder(long)


def test_the_private_packages_fit_a_path_of_windows():
    """In a checkout whose own path has 90 characters, such as a WebUI's extension in a user's documents."""
    pinned = re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements" / "host.txt").read_text(), re.MULTILINE)
    names = [str(file) for name in pinned for file in metadata.files(name) or () if "__pycache__" not in str(file)]
    compiled = len("__pycache__/") + len(".cpython-313") + len("c")
    while_set_up = max(map(len, names)) + len("/.private/new-12345678/new/")
    after = max(len(name) + compiled * name.endswith(".py") for name in names) + len("/.private/site-packages/")
    assert len(names) > 1000 and 90 + max(while_set_up, after) < 260


def test_names_on_disks_that_take_case_or_accents_for_the_same(tmp_path):
    """Windows and macOS take Style and style for one file; older disks of macOS store letters taken apart."""
    (tmp_path / "STYLE.safetensors").touch()
    (tmp_path / (unicodedata.normalize("NFD", "\u00e4") + ".json")).touch()
    assert library.fresh_name(tmp_path, "style") == "style-2"
    assert library.fresh_name(tmp_path, "\u00c4") == "\u00c4-2"
    from i2l_ext.batch import requests_of
    from i2l_ext.requests import MakeRequest

    for name in ("A.png", "a.jpg", "\u00c4.png", "\u00e4.jpg"):
        (tmp_path / name).touch()
    asked = [request.name for request in requests_of([tmp_path], MakeRequest(()))]
    assert len({name.lower() for name in asked}) == 4


def test_a_checkout_with_the_line_ends_of_windows(tmp_path):
    """As git makes it where it was told so before .gitattributes came, and as some archives have it."""
    checkout = tmp_path / "checkout"
    away = shutil.ignore_patterns("__pycache__", "claims")
    for name in ("i2l_ext", "converters", "requirements"):
        shutil.copytree(ROOT / name, checkout / name, ignore=away)
    shutil.copy(ROOT / "install.py", checkout)
    for path in checkout.rglob("*"):
        if path.suffix in (".py", ".json", ".txt", ".css", ".js", ".yaml"):
            path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "it.png")
    words = ["-m", "i2l_ext", "make", tmp_path / "it.png", "--model", "mini", "--lora-dir", tmp_path, "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    ended = subprocess.run([sys.executable, *map(str, words)], cwd=checkout, env=environment, capture_output=True)
    assert ended.returncode == 0 and (tmp_path / "it.safetensors").is_file(), ended.stderr
    pins = (
        "import install; text = (install.REQUIREMENTS / 'host.txt').read_text(encoding='utf-8');"
        "print(install._pins_of(['tqdm'], text).count('--hash'))"
    )
    ended = subprocess.run([sys.executable, "-c", pins], cwd=checkout, capture_output=True, text=True)
    assert int(ended.stdout) > 0, ended.stderr


# --- the self-test ------------------------------------------------------------------------------------------------


def test_the_self_test_tells_ten_lines_and_nothing_private(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(selftest, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(selftest, "SIDE", 64)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main(["doctor", "--selftest"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 10 and selftest.FAILED not in said
    assert str(tmp_path) not in said and str(Path.home()) not in said
    assert not list(tmp_path.iterdir())


def test_the_self_test_says_what_fails_and_goes_on(monkeypatch, capsys):
    def broken(folder, context):
        raise OSError(errno.EIO, "broken", str(folder / "x"))

    monkeypatch.setattr(selftest, "CHECKS", {"reads": broken, "encodings": selftest._console})
    assert main(["doctor", "--selftest"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["reads", "FAILED:", "OSError:"] and "\u2026" in first and "i2l-test" not in first
    assert second.startswith("encodings")
    found = perform(DoctorRequest(selftest=True), Context())
    assert found.failed and list(found.json()) == ["reads", "encodings"]


def test_the_workflow_runs_the_two_commands_of_the_readme():
    readme = re.findall(r"^(python install\.py \w+) ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    workflow = (ROOT / ".github" / "workflows" / "systems.yml").read_text(encoding="utf-8")
    assert readme == ["python install.py demo", "python install.py ui", "python install.py test"]
    assert re.findall(r"run: (python install\.py \w+)$", workflow, re.MULTILINE) == [readme[0], readme[2]]
    assert all(system in workflow for system in ("ubuntu-", "windows-", "macos-"))
