"""Setting up DiffSynth-Studio in a folder of its own: whole or not at all, held against hashes, resumed."""

import hashlib
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest

from i2l_ext.commands.main import main
from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.v2_models import setup
from i2l_ext.v2_models.python import find_python
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks

ROOT = Path(__file__).resolve().parent.parent
GOOD = {"diffsynth/__init__.py": "", "diffsynth/core.py": "", "diffsynth/diffusion/__init__.py": "",
        "diffsynth/diffusion/template.py": ""}  # fmt: skip


def wheel(folder, name, version, files):
    """A small wheel; its hash."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {**files, f"{info}/METADATA": about, f"{info}/WHEEL": tag}
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in {**files, f"{info}/RECORD": "".join(f"{one},,\n" for one in files)}.items():
            archive.writestr(inner, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels in place of the network, a lock that names them, and a plan."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, held in {"XDG_DATA_HOME": tmp_path / "user", "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": wheels,
                       "PIP_CONFIG_FILE": os.devnull, "I2L_TORCH_INDEX": ""}.items():  # fmt: skip
        monkeypatch.setenv(name, str(held))
    monkeypatch.delenv("I2L_DIFFSYNTH", raising=False)
    monkeypatch.setattr(setup, "TORCH", ("torch==1.0",))
    monkeypatch.setattr(setup, "lock_file", lambda: tmp_path / "lock.txt")
    wheel(wheels, "torch", "1.0", {"torch.py": ""})

    def publish(files=GOOD, digest=None):
        digest = digest or wheel(wheels, "diffsynth", "2.1.12", files)
        (tmp_path / "lock.txt").write_text(f"diffsynth==2.1.12 \\\n    --hash=sha256:{digest}\n")
        return setup.SetupPlan(tmp_path / "user" / "i2l" / "diffsynth", "", 1, 1)

    return publish


def test_it_is_set_up_whole_in_a_folder_of_its_own(index, tmp_path):
    site = Path(os.__file__).parent, Path(sys.prefix)
    before = [sorted(path.name for path in folder.rglob("*.dist-info")) for folder in site]
    with pytest.raises(UserError, match="i2l models diffsynth"):
        find_python(None)
    plan, told = index(), []
    setup.set_up(plan, Callbacks(progress=told.append))
    assert plan.is_done and told and told == sorted(told)
    found = find_python(None)
    assert found.version == "2.1.12" and plan.folder in found.executable.parents
    assert sorted(path.name for path in plan.folder.parent.iterdir()) == ["diffsynth", "diffsynth.lock"]
    assert before == [sorted(path.name for path in folder.rglob("*.dist-info")) for folder in site]


@pytest.mark.parametrize("trouble", ["hash", "no hash", "import", "cancel", "network"])
def test_it_appears_whole_or_not_at_all(index, tmp_path, monkeypatch, trouble):
    plan, callbacks, looks = index(), NO_CALLBACKS, []
    plan.folder.mkdir(parents=True)
    (plan.folder / setup.STAMP).write_text("of an older version")
    if trouble == "hash":
        index(digest="0" * 64)
    elif trouble == "no hash":
        (tmp_path / "lock.txt").write_text("diffsynth==2.1.12\n")
    elif trouble == "import":
        index({**GOOD, "diffsynth/core.py": "raise ImportError('two\\nlines')"})
    elif trouble == "network":
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    else:
        callbacks = Callbacks(cancelled=lambda: looks.append(1) or len(looks) > 5)
    with pytest.raises(Cancelled if trouble == "cancel" else UserError) as raised:
        setup.set_up(plan, callbacks)
    if trouble != "cancel":
        assert "\n" not in str(raised.value) and "was not set up" in str(raised.value)
    if trouble == "network":
        assert raised.value.code == "no_network" and "What was fetched is kept" in str(raised.value)
    assert [path.name for path in plan.folder.iterdir()] == [setup.STAMP]  # the old one is untouched
    assert not (plan.folder.parent / "diffsynth.part" / "new" / setup.STAMP).exists()


def test_only_one_is_at_it_and_there_is_room(index, monkeypatch):
    plan = index()
    part = plan.folder.with_name("diffsynth.part")
    part.mkdir(parents=True)
    lock = setup.Lock(part.with_suffix(".lock"))
    assert lock.acquire()
    with pytest.raises(UserError, match="by another process"):
        setup.set_up(plan, NO_CALLBACKS)
    lock.release()
    with pytest.raises(UserError, match="are needed"):
        setup.set_up(setup.SetupPlan(plan.folder, "", 1 << 60, 1), NO_CALLBACKS)


def test_the_command_says_how_large_it_is_before(index, capsys):
    index()
    assert main(["models", "diffsynth"]) == 1
    told = capsys.readouterr().err
    assert "0.4 GB to download" in told and "1.4 GB on the disk" in told and "--yes" in told
    assert main(["models", "diffsynth", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["present"]
    assert main(["models", "diffsynth"]) == 0  # it is there: nothing to ask


def test_the_lock_holds_every_package_that_diffsynth_asks_for():
    from importlib.metadata import requires

    text = (ROOT / "requirements" / "diffsynth.txt").read_text()
    held = {line.partition("==")[0] for line in text.splitlines() if "==" in line and line[0].isalnum()}
    unhashed = {one.partition("==")[0] for one in setup.TORCH}
    asked = {re.match(r"[\w-]+", one)[0] for one in requires("diffsynth") if "extra" not in one}
    assert asked <= held | unhashed and f"diffsynth=={setup.VERSION}" in text
    assert f"torch=={(ROOT / 'requirements/torch.txt').read_text().split('==')[-1].strip()}" == setup.TORCH[0]
