"""The ways in: a wheel, a plain checkout in a WebUI's extensions folder, and install.py as the WebUI calls it."""

import hashlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

from i2l_ext import private_packages
from i2l_ext.converters.errors import UserError
from i2l_ext.webui import standalone

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd, path):
    """A process that sees the packages of this environment, but of our code only what lies in ``path``."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)


WHERE = "import i2l_ext, i2l_ext.converters as c, i2l_ext.converters.lora; print(i2l_ext.__file__); print(c.__file__)"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (300, 200), "crimson").save(path)
    return path


def test_the_wheel_holds_everything(tmp_path, picture):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    assert subprocess.run(list(map(str, build)), capture_output=True).returncode == 0
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    assert subprocess.run(list(map(str, pip)), capture_output=True).returncode == 0

    found = run(sys.executable, "-c", WHERE, cwd=tmp_path, path=site)
    assert [Path(line).is_relative_to(site) for line in found.stdout.split()] == [True, True], found.stderr
    command = site / ("Scripts/i2l.exe" if os.name == "nt" else "bin/i2l")
    made = run(command, "make", picture, "--model", "mini", "--lora-dir", tmp_path / "Lora", cwd=tmp_path, path=site)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "Lora" / "red.safetensors").is_file()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = subprocess.Popen(
        [command, "ui", "--port", str(port), "--lora-dir", tmp_path / "Lora"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(site), "I2L_STATE": str(tmp_path / "state"), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        url = next(word for word in page.stdout.readline().split() if word.startswith("http"))
        with urllib.request.urlopen(url) as answer:
            shown = answer.read().decode()
        for asset in standalone.SCRIPTS:
            assert (site / "i2l_ext" / "webui" / "assets" / Path(asset).name).read_bytes() == (
                ROOT / asset
            ).read_bytes()
        for words in (ROOT / "i2l_ext" / "webui" / "languages").glob("*.json"):
            assert (site / "i2l_ext" / "webui" / "languages" / words.name).read_bytes() == words.read_bytes()
        assert "window.imageToLora" in shown and "图片转 LoRA" in shown and "i2l_make" in shown
    finally:
        page.kill()
        page.wait()


def test_a_plain_checkout_in_a_webui_finds_its_lora_folder(tmp_path, picture):
    checkout = tmp_path / "webui" / "extensions" / "image-to-lora"
    (tmp_path / "webui" / "models" / "Lora").mkdir(parents=True)
    for folder in ("i2l_ext", "converters"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    found = run(sys.executable, "-c", WHERE, cwd=checkout, path=checkout)
    assert all(Path(line).is_relative_to(checkout) for line in found.stdout.split()), found.stderr
    made = run(sys.executable, "-m", "i2l_ext", "make", picture, "--model", "mini", cwd=checkout, path=checkout)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "webui" / "models" / "Lora" / "red.safetensors").is_file()


@pytest.mark.parametrize(("version", "said"), [((3, 9), "3.10 or newer"), ((3, 15), "3.14 or older")])
def test_a_python_out_of_range_is_told(install, monkeypatch, capsys, version, said):
    monkeypatch.setattr(install, "TASKS", dict.fromkeys(install.TASKS, lambda _: 0))
    with monkeypatch.context() as patch:
        patch.setattr(install.sys, "version_info", version)
        codes = {task: install.main([task]) for task in ("demo", "ui", "test", "host")}
    assert codes == {"demo": 1, "ui": 1, "test": 1, "host": int(version < (3, 10))}
    assert capsys.readouterr().err.count(said) == sum(codes.values())


def test_the_newest_python_is_that_of_pyproject(install):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">=3.10,<{".".join(map(str, install.TOO_NEW))}"' in project


@pytest.fixture
def install(monkeypatch, tmp_path):
    """install.py as a module, with its pip calls noted instead of made."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PRIVATE", tmp_path / "private")
    module.calls, module.wanted = [], set()

    def run(command, **_):
        module.calls.append(command)
        if "--target" in command:
            module.wanted = {pin.name for pin, _ in pins(Path(command[command.index("-r") + 1]))}

    monkeypatch.setattr(module.subprocess, "run", run)
    return module


def test_a_host_that_has_all_is_left_alone(install, capsys):
    assert install.main([]) == 0
    assert install.calls == [] and capsys.readouterr() == ("", "")
    assert not install.PRIVATE.exists()


def test_an_old_host_gets_a_private_folder_once(install, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(install.metadata, "version", lambda name: "4.46.1" if name == "transformers" else version(name))
    assert install.main([]) == 0 and install.main([]) == 0
    [command] = install.calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert "--no-deps" in command
    target = Path(command[command.index("--target") + 1])  # a fresh folder, which then took the other's place
    assert target.parent.parent == install.PRIVATE.parent and not target.parent.exists()
    assert private_packages.is_current(install.PRIVATE)
    assert {"--require-hashes", "--only-binary=:all:"} <= set(command)
    assert {"transformers", "tokenizers"} <= install.wanted
    assert install.wanted.isdisjoint({"torch", "numpy", "pillow", "protobuf", "gradio", "pydantic"})


def test_only_what_is_missing_is_fetched_and_its_size_is_told_before(install, monkeypatch, capsys):
    version, lacking = metadata.version, {"platformdirs"}
    monkeypatch.setattr(install.metadata, "version", lambda name: "0.1" if name in lacking else version(name))
    assert install.main([]) == 0
    assert install.wanted == {"platformdirs"}
    assert "newer platformdirs" in (told := capsys.readouterr().out) and "0.1 MB to download" in told
    assert install.main([]) == 0 and len(install.calls) == 1
    lacking.add("transformers")  # the host has gone back to an older one
    assert install.main([]) == 0 and len(install.calls) == 2
    assert {"platformdirs", "transformers", "tokenizers"} <= install.wanted and "diffusers" not in install.wanted
    lacking.clear()
    assert install.main([]) == 0 and len(install.calls) == 2


def test_the_sizes_of_all_pins_are_known(install):
    pinned = {pin.name for pin, _ in pins(ROOT / "requirements" / "host.txt")}
    assert set(install.MEGABYTES) == pinned
    assert pinned == {*install.NEEDS, *(one for need in install.NEEDS.values() for one in need.brings)}


def test_a_hosts_peft_is_the_one_that_these_tests_run_beside_transformers_5():
    """It comes with diffusers and meets the host's own transformers: 0.17.1 cannot be imported beside a new one."""
    versions = [
        {pin.name: str(pin.specifier) for pin, _ in pins(ROOT / "requirements" / file)}
        for file in ("host.txt", "lock-test.txt")
    ]
    assert versions[0]["peft"] == versions[1]["peft"]


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "pip"), KeyboardInterrupt(), OSError("disk full")])
def test_an_update_that_breaks_off_leaves_the_private_folder_as_it_was(install, monkeypatch, error):
    (install.PRIVATE / "transformers").mkdir(parents=True)
    (install.PRIVATE / "transformers" / "__init__.py").write_text("old")
    (install.PRIVATE / private_packages.STAMP).write_text("of other pins")

    def pip(command, **_):
        target = Path(command[command.index("--target") + 1])
        (target / "transformers").mkdir()
        (target / "transformers" / "__init__.py").write_text("new")
        raise error

    monkeypatch.setattr(install.subprocess, "run", pip)
    monkeypatch.setattr(install.metadata, "version", lambda name: "0.1")
    assert install.main([]) == (130 if isinstance(error, KeyboardInterrupt) else 0)
    assert (install.PRIVATE / "transformers" / "__init__.py").read_text() == "old"
    assert [path.name for path in install.PRIVATE.parent.iterdir()] == [install.PRIVATE.name]
    assert not private_packages.is_current(install.PRIVATE)


def test_a_new_folder_that_cannot_be_moved_brings_the_old_one_back(install, monkeypatch, capsys):
    """As on Windows, where a scanner may hold a file that was just written."""
    (install.PRIVATE / "transformers").mkdir(parents=True)
    rename = Path.rename

    def held(path, target):
        if path.name == "new":
            raise PermissionError(13, "Access is denied")
        return rename(path, target)

    monkeypatch.setattr(install.metadata, "version", lambda name: "0.1")
    monkeypatch.setattr(Path, "rename", held)
    assert install.main([]) == 0 and "could not be installed" in capsys.readouterr().out
    assert [path.name for path in install.PRIVATE.iterdir()] == ["transformers"]


def test_an_update_leaves_nothing_of_the_old_packages(install, monkeypatch):
    killed = install.PRIVATE.parent / "new-killed"
    for folder in (install.PRIVATE / "old_package", killed):
        folder.mkdir(parents=True)
    os.utime(killed, (1, 1))
    monkeypatch.setattr(install.metadata, "version", lambda name: "0.1")
    assert install.main([]) == 0
    assert [path.name for path in install.PRIVATE.iterdir()] == [private_packages.STAMP]
    assert [path.name for path in install.PRIVATE.parent.iterdir()] == [install.PRIVATE.name]


@pytest.mark.parametrize("line", [None, 0, 1, 2, "empty", "not text"])
def test_the_engine_takes_only_the_packages_of_its_python_and_pins(monkeypatch, tmp_path, line):
    monkeypatch.setattr(private_packages, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    lines = private_packages.expected_stamp().split("\n")
    if isinstance(line, int):
        lines[line] += "0"
    said = {"empty": b"", "not text": b"\xff\xfe"}.get(line, "\n".join(lines).encode())
    (tmp_path / private_packages.STAMP).write_bytes(said)
    private_packages.add_to_path()
    assert (sys.path[0] == str(tmp_path)) is (line is None)


def test_pip_failing_does_not_keep_the_webui_from_starting(install, monkeypatch, capsys):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(install.subprocess, "run", fail)
    monkeypatch.setattr(install.metadata, "version", lambda name: "0.1")
    assert install.main([]) == 0
    assert "The WebUI is unchanged" in capsys.readouterr().out


def wheel(folder, name, version):
    """A package with nothing in it but its version."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{module}/__init__.py", f"__version__ = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.skipif(os.name == "nt", reason="paths of a Unix environment")
def test_a_hosts_packages_stay_byte_for_byte(install, tmp_path, monkeypatch):
    """A WebUI with an old transformers and no network but a folder of wheels: its packages before and after."""
    monkeypatch.undo()
    wheels, webui = tmp_path / "wheels", tmp_path / "webui"
    wheels.mkdir()
    checkout = webui / "extensions" / "image-to-lora"
    pins = re.findall(r"^(\S+==\S+)", (ROOT / "requirements" / "host.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert any(pin.startswith("transformers==4.57.") for pin in pins)
    made = {pin: wheel(wheels, *pin.split("==")) for pin in (*pins, "transformers==4.46.1", "numpy==1.26.4")}
    (checkout / "requirements").mkdir(parents=True)
    lines = [f"{pin} --hash=sha256:{hashlib.sha256(made[pin].read_bytes()).hexdigest()}\n" for pin in pins]
    (checkout / "requirements" / "host.txt").write_text("".join(lines))
    shutil.copytree(ROOT / "i2l_ext", checkout / "i2l_ext", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "install.py", checkout)
    venv.EnvBuilder(with_pip=True).create(webui / "venv")
    python = webui / "venv" / "bin" / "python"
    own = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_DISABLE_PIP_VERSION_CHECK": "1",
           "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"], "HOME": str(tmp_path)}  # fmt: skip

    def call(*words):
        return subprocess.run([python, *words], cwd=webui, env=own, capture_output=True, text=True, check=True).stdout

    call("-m", "pip", "install", "--quiet", "transformers==4.46.1", "numpy==1.26.4")

    def state():
        files = sorted(path for path in (webui / "venv").rglob("*") if path.is_file())
        return call("-m", "pip", "freeze", "--all"), {
            path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }

    before = state()
    assert "transformers==4.46.1" in before[0] and len(before[1]) > 100
    assert "installing newer transformers" in call(str(checkout / "install.py"))
    assert state() == before
    assert call(str(checkout / "install.py")) == ""  # the next launch has nothing to do
    assert state() == before
    code = "import transformers, numpy; print(transformers.__version__, numpy.__version__)"
    begin = f"import sys; sys.path.insert(0, {str(checkout)!r}); from i2l_ext import private_packages"
    engine = f"{begin}; private_packages.add_to_path(); {code}"
    assert call("-c", code).split() == ["4.46.1", "1.26.4"]
    assert call("-c", engine).split() == ["4.57.6", "1.26.4"]


def test_an_unknown_task_is_a_usage_error(install, capsys):
    assert install.main(["dmeo"]) == 2
    assert "demo" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "option"), [("demo", "--outt"), ("ui", "--prot=3")])
def test_a_wrong_option_is_told_before_anything_is_installed(install, monkeypatch, capsys, task, option):
    monkeypatch.setattr(install, "_environment", lambda extras: pytest.fail("installed"))
    with pytest.raises(SystemExit) as left:
        install.main([task, option])
    assert left.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_has_a_line_for_each_task(install, capsys, word):
    assert install.main([word]) == 0 and install.calls == []
    told = capsys.readouterr().out
    assert "python install.py  " in told
    assert all(f"python install.py {task} " in told for task in install.TASKS if task != "host")


def test_a_port_that_is_taken_is_told_as_such(monkeypatch):
    """gradio says the same of each port that it cannot have."""

    def refuse(*_, **__):
        raise OSError("Cannot find empty port in range: 1-1. You can specify another one to `launch()`.")

    monkeypatch.setattr(standalone, "start_page", refuse)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError) as told:
            standalone.serve_page("127.0.0.1", port)
    assert str(told.value) == f"Port {port} is taken, perhaps by your WebUI: choose another, --port {port + 1}."
    with pytest.raises(UserError, match=r"to `launch\(\)`\. Choose another --port\."):
        standalone.serve_page("127.0.0.1", port)


@pytest.mark.parametrize(("text", "numbers"), [("4.56.1rc1", (4, 56, 1)), ("2.13.0+cpu", (2, 13, 0)), ("", ())])
def test_versions_compare_as_numbers(install, text, numbers):
    assert install._numbers(text) == numbers


LOCKS = [ROOT / "requirements" / f"lock-{name}.txt" for name in ("mini", "ui", "test")]


def pins(file):
    """(Requirement, its hashes) of a file that requirements/relock.py has written."""
    from packaging.requirements import Requirement

    entries = file.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    for entry in filter(None, (entry.partition("#")[0].strip() for entry in entries)):
        requirement, *hashes = entry.split(" --hash=")
        yield Requirement(requirement), hashes


@pytest.mark.parametrize("file", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda file: file.name)
def test_every_version_is_exact_and_has_its_hashes(file):
    """But for torch, which is alone in its file."""
    found = list(pins(file))
    assert found
    for pin, hashes in found:
        assert len(pin.specifier) == 1 and str(pin.specifier).startswith("=="), pin
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one.strip()) for one in hashes), pin
        assert bool(hashes) is (file.name != "torch.txt"), pin
    if file.name == "torch.txt":
        assert [str(pin) for pin, _ in found] == ["torch==2.13.0"]


@pytest.mark.parametrize("system", ["linux", "win32", "darwin"])
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_locks_name_every_dependency_once(version, system):
    """For each Python and system: what pyproject asks for, each extra in the files that serve it."""
    tomllib = pytest.importorskip("tomllib")
    from packaging.requirements import Requirement

    python = {"python_version": version, "python_full_version": f"{version}.1", "sys_platform": system, "extra": "",
              "os_name": "nt" if system == "win32" else "posix", "platform_machine": "x86_64"}  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras, names = project["optional-dependencies"], ["torch"]
    needed = [*project["dependencies"], "hatchling", "editables"]
    for file, more in zip(LOCKS, (["mini"], ["ui"], ["test", "train", "modelscope"]), strict=True):
        names += [pin.name for pin, _ in pins(file) if pin.marker is None or pin.marker.evaluate(python)]
        needed += [line for extra in more for line in extras[extra] if not line.startswith("image-to-lora")]
        assert {Requirement(line).name.lower().replace("_", "-") for line in needed} <= set(names)
    assert len(names) == len(set(names))


@pytest.fixture
def environment(install, monkeypatch, tmp_path):
    """install.py with an environment that it makes in a temporary folder."""
    made = tmp_path / "made"
    for python in ("bin/python", "Scripts/python.exe"):
        (made / python).parent.mkdir(parents=True)
        (made / python).touch()
    monkeypatch.setattr(install, "ENVIRONMENT", tmp_path / ".venv")
    monkeypatch.setattr(install.venv.EnvBuilder, "create", lambda self, folder: shutil.copytree(made, folder))
    monkeypatch.delenv("I2L_TORCH_INDEX", raising=False)
    return install


def test_a_graphics_card_on_windows(environment, monkeypatch, capsys):
    """PyPI's torch does not use it there: that is said, and another index is taken, and remembered."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(environment.shutil, "which", lambda name: name)
    environment._environment("mini,ui")
    assert "set I2L_TORCH_INDEX=https://download.pytorch.org/whl/cu" in capsys.readouterr().out
    assert "--index-url" not in environment.calls[1]
    environment.calls.clear()
    monkeypatch.setenv("I2L_TORCH_INDEX", "https://example.org/cu1")
    environment._environment("mini,ui")
    monkeypatch.delenv("I2L_TORCH_INDEX")
    environment._environment("mini,ui")  # nothing to do
    environment._environment("test")
    assert "I2L_TORCH_INDEX" not in capsys.readouterr().out
    torch = [command for command in environment.calls if command[-1].endswith("torch.txt")]
    assert len(environment.calls) == 6 and len(torch) == 2
    assert all(command[-5:-2] == ["--upgrade", "--index-url", "https://example.org/cu1"] for command in torch)


@pytest.mark.parametrize("place", ["lib/python3.12/site-packages/torch", "Lib/site-packages/torch"])
def test_a_long_wait_is_told_only_where_torch_is_still_to_come(environment, monkeypatch, capsys, place):
    environment._environment("mini")
    assert "torch is large" in capsys.readouterr().out
    (environment.ENVIRONMENT / place).mkdir(parents=True)
    environment._environment("mini,ui")
    assert capsys.readouterr().out == "Installing exact versions\n"
    monkeypatch.setenv("I2L_TORCH_INDEX", "https://example.org/cu1")
    environment._environment("mini,ui")
    assert "torch is large" in capsys.readouterr().out


@pytest.mark.parametrize(("system", "card"), [("linux", "nvidia-smi"), ("win32", None)])
def test_nothing_is_said_of_cards_where_there_is_nothing_to_do(environment, monkeypatch, capsys, system, card):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(environment.shutil, "which", lambda name: card)
    environment._environment("mini")
    assert "I2L_TORCH_INDEX" not in capsys.readouterr().out


def test_the_python_of_an_environment_on_windows(environment, monkeypatch):
    class Windows:
        name = "nt"

        def __getattr__(self, name):
            return getattr(os, name)

    monkeypatch.setattr(environment, "os", Windows())
    assert Path(environment._environment("mini")).parts[-2:] == ("Scripts", "python.exe")
    assert all(Path(command[0]).name == "python.exe" for command in environment.calls)
    environment.calls.clear()
    environment._gradio("3.41")  # the browser tests are not for Windows: nothing is installed for them
    assert not environment.calls


def test_a_set_up_that_breaks_off_is_done_again(environment, monkeypatch):
    environment._environment("mini")
    run = environment.subprocess.run
    (environment.ENVIRONMENT / "i2l-mini.sha256").write_text("of other locks")

    def fail(command, **_):
        assert not (environment.ENVIRONMENT / "i2l-mini.sha256").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(environment.subprocess, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        environment._environment("mini")
    monkeypatch.setattr(environment.subprocess, "run", run)
    environment.calls.clear()
    environment._environment("mini")
    assert len(environment.calls) == 3


def test_what_the_set_up_installs_is_held_against_hashes(environment):
    install = environment
    for extras, count in (("mini", 1), ("mini,ui", 2), ("test", 4)):
        install.calls.clear()
        install._environment(extras)
        locked, torch, ours = install.calls
        assert {"--require-hashes", "--only-binary=:all:", "--no-deps"} <= set(locked) and locked.count("-r") == count
        assert torch[-1].endswith("torch.txt") and torch.count("-r") == 1
        assert "--no-deps" in ours and "--no-build-isolation" in ours and ours[-1] == str(ROOT)
        install.calls.clear()
        install._environment(extras)
        assert install.calls == []


@pytest.mark.parametrize("system", ["linux", "win32"])
def test_the_demo_names_the_command_as_the_users_shell_takes_it(tmp_path, monkeypatch, system):
    """Bare where the shell finds this very one; else the one beside this Python, from the folder where the user is."""
    from i2l_ext.commands.demo import own_command

    folder, name = ("Scripts", "i2l.exe") if system == "win32" else ("bin", "i2l")
    place = tmp_path / "with blank" / ".venv" / folder
    place.mkdir(parents=True)
    for file in (place / name, place / "python"):
        file.touch(mode=0o755)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(sys, "executable", str(place / "python"))
    found = {}
    monkeypatch.setattr(shutil, "which", found.get)
    monkeypatch.chdir(tmp_path / "with blank")
    near = Path(".venv", folder, "i2l")
    assert own_command() == str(near)
    found["i2l"] = str(place / name)
    assert own_command() == "i2l"
    found["i2l"] = str(place / "python")  # another one is first on the path
    assert own_command() == str(near)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    quote = '"' if system == "win32" else "'"
    assert own_command() == f"{quote}{tmp_path / 'with blank' / near}{quote}"
    (place / name).unlink()
    monkeypatch.chdir(tmp_path / "with blank")
    assert own_command() == f"{Path('.venv', folder, 'python')} -m i2l_ext"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_the_page_ends_with_the_command_that_started_it(tmp_path):
    """Else it would live on, and keep its port."""
    page = tmp_path / "python"
    page.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    page.chmod(0o700)
    code = f"import install; install._environment = lambda extras: {str(page)!r}; raise SystemExit(install.ui([]))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as command:
        until = time.monotonic() + 20
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < until
            time.sleep(0.05)
        command.terminate()
        assert command.wait(10) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
