"""The WebUIs, told apart and handled as the real ones want it, in the stand-in."""

import importlib
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from i2l_ext.engine.job import Job
from i2l_ext.webui.hosts.a1111 import A1111Host

STAND_IN = Path(__file__).resolve().parent / "fake_host"
FLAVOURS = {
    "a1111": ("a1111", "AUTOMATIC1111", False),
    "forge": ("forge", "Forge", False),
    "reforge": ("forge", "reForge or Forge Classic", False),
    "forge-neo": ("forge-neo", "Forge Neo", True),
    "sdnext": ("sdnext", "SD.Next", True),
}


def module(name, **attributes):
    made = ModuleType(name)
    vars(made).update(attributes)
    return made


@pytest.fixture
def host(request, tmp_path, monkeypatch):
    """The Host of a flavour of the stand-in; ``host.modules(name)`` are its modules."""
    flavour = request.param
    monkeypatch.setenv("FAKE_ROOT", str(tmp_path))
    monkeypatch.setenv("FAKE_FLAVOUR", flavour)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("modules", "networks")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(STAND_IN))
    (tmp_path / "models" / "Lora").mkdir(parents=True)
    listing = module("networks", available_networks={}, calls=[])
    listing.list_available_networks = lambda: (listing.calls.append("emptied"), listing.available_networks.clear())
    listing.update_available_networks_by_names = lambda names: listing.calls.append("added")
    listing.load_lora_state_dict = SimpleNamespace(cache_clear=lambda: listing.calls.append("forgotten"))
    if "forge" in flavour:
        (tmp_path / "modules_forge").mkdir()
    if flavour == "sdnext":
        package = importlib.import_module("modules")
        lora = module("modules.lora", __path__=[], lora_load=listing)
        lora.__spec__ = importlib.util.spec_from_loader("modules.lora", None, is_package=True)
        monkeypatch.setitem(sys.modules, "modules.lora", lora)
        monkeypatch.setattr(package, "lora", lora, raising=False)
    else:
        monkeypatch.setitem(sys.modules, "networks", listing)
    from i2l_ext.webui.hosts.running import running_host

    if flavour == "reforge":
        memory = module("memory", unload_all_models=lambda: host.models.moves.append("unloaded"))
        monkeypatch.setitem(sys.modules, "ldm_patched.modules.model_management", memory)
    host = running_host()
    host.models, host.networks = importlib.import_module("modules.sd_models"), listing
    yield host
    for name in [name for name in sys.modules if name.partition(".")[0] == "modules"]:
        del sys.modules[name]


each = pytest.mark.parametrize("host", FLAVOURS, indirect=True)


@pytest.mark.parametrize(("host", "told"), FLAVOURS.items(), indirect=["host"])
def test_they_are_told_apart_by_what_they_can_do(host, told):
    assert (host.name, host.title, host.applies_loras) == told
    from i2l_ext.requests.make import HOSTS

    assert host.name in HOSTS


@each
def test_its_own_flag_names_the_folder_of_loras(host, tmp_path, monkeypatch):
    flags = importlib.import_module("modules.shared").cmd_opts
    assert host.lora_folder() == Path(getattr(flags, host.lora_flag))
    monkeypatch.setattr(flags, host.lora_flag, str(tmp_path / "elsewhere"))
    assert host.lora_folder() == tmp_path / "elsewhere"
    monkeypatch.setattr(flags, host.lora_flag, None)
    assert host.lora_folder() == tmp_path / "models" / "Lora"


def a_job(tmp_path, state="waiting", kind="make"):
    return Job("a", kind, "style", {}, tmp_path, state=state)


@each
def test_the_checkpoint_leaves_the_card_and_is_there_for_the_next_picture(host, tmp_path, monkeypatch):
    before, keeps = host.models.model_data.sd_model, isinstance(host, A1111Host)
    with host.exclusive_gpu(a_job(tmp_path)):
        assert "unloaded" in host.models.moves
        if keeps:
            assert before.device == "cpu"
    assert host.models.moves == (["unloaded", "sent"] if keeps else ["unloaded"])
    assert before.device != "cpu", "the next picture would fail"
    assert host.models.model_data.loaded_by_reading == 0, "reading shared.sd_model loads a checkpoint"
    with pytest.raises(RuntimeError), host.exclusive_gpu(a_job(tmp_path)):
        raise RuntimeError
    assert before.device != "cpu", "nor after a job that failed"


@pytest.mark.parametrize("host", ["a1111", "sdnext"], indirect=True)
def test_without_a_checkpoint_none_is_loaded(host, tmp_path):
    host.models.model_data.sd_model = None
    with host.exclusive_gpu(a_job(tmp_path)):
        pass
    host.refresh_loras()
    assert host.models.moves == [] and host.models.model_data.loaded_by_reading == 0


@pytest.mark.parametrize("host", ["a1111"], indirect=True)
def test_a_checkpoint_that_was_exchanged_meanwhile_is_left_alone(host, tmp_path):
    with host.exclusive_gpu(a_job(tmp_path)):
        host.models.model_data.sd_model = SimpleNamespace(device="cuda")
    assert host.models.moves == ["unloaded"]


@each
def test_what_does_not_compute_leaves_the_checkpoint_alone(host, tmp_path):
    for job in (a_job(tmp_path, "cancelled"), a_job(tmp_path, kind="download"), a_job(tmp_path, kind="inspect")):
        with host.exclusive_gpu(job):
            assert host.models.moves == []
    assert host.models.moves == []


@each
def test_the_list_of_loras_is_added_to(host, tmp_path):
    there = tmp_path / "models" / "Lora" / "there.safetensors"
    there.touch()
    gone = there.with_name("gone.safetensors")
    held = host.networks.available_networks
    held |= {"there": SimpleNamespace(filename=str(there)), "gone": SimpleNamespace(filename=str(gone))}
    host.refresh_loras()
    assert host.models.model_data.loaded_by_reading == 0
    if host.name == "sdnext":
        assert host.networks.calls == ["emptied"]
        return
    assert "added" in host.networks.calls and "emptied" not in host.networks.calls
    assert set(held) == {"there"}
    if host.name.startswith("forge"):
        model = host.models.model_data.sd_model
        model.current_lora_hash = "stale"
        host.refresh_loras()
        assert "forgotten" in host.networks.calls and model.current_lora_hash is None


@pytest.mark.parametrize("host", ["forge"], indirect=True)
def test_a_host_without_a_way_to_add_lists_anew(host):
    del host.networks.update_available_networks_by_names
    host.refresh_loras()
    assert "emptied" in host.networks.calls


@each
def test_a_second_job_waits_for_the_hosts_own(host, tmp_path):
    queue = importlib.import_module("modules.call_queue").queue_lock
    entered = threading.Event()

    def run():
        with host.exclusive_gpu(a_job(tmp_path)):
            entered.set()

    with queue:
        threading.Thread(target=run, daemon=True).start()
        assert not entered.wait(0.2) and host.models.moves == []
    assert entered.wait(5)


@pytest.mark.parametrize(("host", "told"), [("a1111", "zh_CN"), ("sdnext", "ru: Russian")], indirect=["host"])
def test_the_language_that_was_chosen_in_the_host(host, told, monkeypatch):
    assert host.language() == ""
    monkeypatch.setenv("FAKE_LANGUAGE", told)
    assert host.language() == told
