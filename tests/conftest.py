"""The small models, as tests ask for them."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from i2l_ext.commands.main import main
from i2l_ext.models import catalogue
from i2l_ext.weights import devices
from small_models import SMALL, build

signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it is ignored, by all we start too


@pytest.fixture(scope="session", autouse=True)
def engine_lock(tmp_path_factory):
    """The engine of the user who runs the tests is not waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("I2L_ENGINE_LOCK", str(tmp_path_factory.mktemp("engine") / "lock"))
        yield


@pytest.fixture(scope="module", autouse=True)
def user_data(tmp_path_factory):
    """What is kept for the user who runs the tests (where downloads went) is left alone, and not heeded; and what one
    file of tests leaves there is not seen by the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("user")))
        yield


@pytest.fixture(scope="session", autouse=True)
def modern_processor():
    """Encoders are computed in bf16 on any machine, as far as they are in the tests' own process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_products_of_bf16_are_quick", lambda: True)
        yield


def pytest_addoption(parser):
    parser.addoption("--renew-snapshots", action="store_true", help="write what test_snapshots.py compares with anew")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("small"))


@pytest.fixture
def world(built, monkeypatch, tmp_path):
    """The small models are the catalogue's, and found; caches and models of the machine are out of sight."""
    monkeypatch.setattr(catalogue, "MODELS", {**catalogue.MODELS, **SMALL})
    monkeypatch.setenv("I2L_MODELS", str(built.models))
    monkeypatch.setenv("I2L_CACHE", str(tmp_path / "cache"))
    return built


@pytest.fixture
def make(world, tmp_path, capsys):
    """Run `i2l make --json`; the object it prints."""

    def run(*arguments, pictures=None, model="small"):
        arguments = [*map(str, pictures or world.pictures[:1]), *map(str, arguments)]
        if "--lora-dir" not in arguments:
            arguments += ["--lora-dir", str(tmp_path / "Lora")]
        if "--name" not in arguments:
            arguments += ["--name", "it"]
        capsys.readouterr()
        code = main(["make", *arguments, "--model", model, "--precision", "fp32", "--json"])
        out, err = capsys.readouterr()
        return json.loads(out) if code == 0 else (code, err)

    return run


@pytest.fixture
def breakable(world, tmp_path, monkeypatch):
    """The same with the small models' files copied, to be spoilt."""
    import shutil

    shutil.copytree(world.models, tmp_path / "models")
    monkeypatch.setenv("I2L_MODELS", str(tmp_path / "models"))
    return replace(world, models=tmp_path / "models")


class RootIsNoPackage:
    """ComfyUI wants an ``__init__.py`` at the root. For pytest that is a package, whose parent it would put first into
    ``sys.path``, so that whatever lies beside the checkout could be imported."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == Path(__file__).resolve().parents[1] else None


def pytest_configure(config):
    config.pluginmanager.register(RootIsNoPackage())
