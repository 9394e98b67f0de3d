"""Models with code of their own: consent, the cage, and what comes back, through the registry's diffsynth."""

import json
import os
import pickle
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import template_world
from i2l_ext import pipeline
from i2l_ext.commands.main import main
from i2l_ext.converters import Lora, inspect
from i2l_ext.converters.architectures import HIDREAM_O1, KLEIN_4B, Z_IMAGE
from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.converters.key_formats import KEY_FORMATS
from i2l_ext.models import catalogue
from i2l_ext.models.store import note_path
from i2l_ext.requests import MakeRequest
from i2l_ext.v2_models import consent, run
from i2l_ext.v2_models.cage import BOUNDS, CagedProcess, strongest_cage
from i2l_ext.v2_models.python import find_python
from i2l_ext.v2_models.repository import TemplateRepository
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks

MODELS = {"z-image-v2": Z_IMAGE, "klein-4b-v2": KLEIN_4B, "hidream-o1-v2": HIDREAM_O1}
caged = pytest.mark.skipif(strongest_cage() is BOUNDS, reason="this system has no cage")
linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are counted on Linux only")


@pytest.fixture(scope="session")
def diffsynth_folder(tmp_path_factory):
    return template_world.environment(tmp_path_factory.mktemp("diffsynth"))


@pytest.fixture(scope="session")
def python(diffsynth_folder):
    return find_python(str(diffsynth_folder))


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Models, answers and pictures of this test alone."""
    monkeypatch.setattr(consent, "record_path", lambda: tmp_path / "trusted.json")
    monkeypatch.setenv("I2L_MODELS", str(tmp_path / "models"))
    Image.new("RGB", (80, 60), (200, 40, 10)).save(tmp_path / "red.png")
    Image.new("RGB", (60, 60), (20, 40, 210)).save(tmp_path / "blue.png")


def template(tmp_path, name="z-image-v2", **hostile):
    """The repository of a model, in the models folder."""
    model = catalogue.MODELS[name]
    folder = tmp_path / "models" / model.template.repo
    template_world.write_template(folder, model.arch, **hostile)
    return TemplateRepository(folder, model.template.repo, name)


def i2l(capsys, *arguments):
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", MODELS)
def test_the_command_makes_what_the_template_makes(tmp_path, capsys, diffsynth_folder, name):
    repository = template(tmp_path, name)
    asked = ("make", tmp_path / "red.png", tmp_path / "blue.png", "--model", name, "--name", "it", "--lora-dir",
             tmp_path / "Lora", "--strength", "0.5", "--diffsynth", diffsynth_folder, "--json")  # fmt: skip
    code, _, error = i2l(capsys, *asked)
    assert code == 1 and f"i2l models trust {name}" in error and not (tmp_path / "Lora/it.safetensors").exists()
    assert i2l(capsys, "models", "trust", name, "--agree", repository.digest)[0] == 0
    code, out, _ = i2l(capsys, *asked)
    assert code == 0
    made = json.loads(out)
    assert made["model"] == name and made["rank"] == 4 and made["settings"]["branch"] == "grey"
    theirs, ours = template_world.run_here(repository.folder, [(200, 40, 10), (20, 40, 210)]), Lora.read(made["file"])
    assert ours.arch is MODELS[name] and len(ours) == 3
    assert ours.read_from.reading.key_format == made["key_format"] == MODELS[name].key_format
    assert MODELS[name].key_format == ("diffusers" if name == "klein-4b-v2" else "webui")
    for path in ours:
        update = theirs[f"{path}.lora_B.default.weight"] @ theirs[f"{path}.lora_A.default.weight"]
        torch.testing.assert_close(ours.delta(path), 0.5 * update, rtol=1e-5, atol=1e-6)
    assert inspect(made["file"]).metadata["i2l.model"] == name
    code, _, error = i2l(capsys, *asked, "--overwrite", "--weights", "1", "2")
    assert code == 1 and "sees all pictures together" in error


@pytest.mark.parametrize("name", ["z-image-v2", "mini"])
def test_a_stop_just_before_the_file_gets_its_name(tmp_path, python, name):
    repository = template(tmp_path)
    consent.agree(repository, repository.digest)
    asked = MakeRequest((tmp_path / "red.png",), name="it", folder=tmp_path / "Lora", model=name)
    stopped = []

    def stop():
        stopped.append(name)
        raise Cancelled

    with pytest.raises(Cancelled):
        pipeline.make(asked, callbacks=Callbacks(begin_saving=stop), python=python)
    assert stopped == [name] and list((tmp_path / "Lora").glob("*")) == []


@pytest.mark.parametrize("arch", MODELS.values(), ids=lambda arch: arch.id)
def test_what_a_template_makes_goes_through_every_command(tmp_path, capsys, arch):
    """Inspected, checked, written in every key format and back: the same update under the names of each."""
    folder = template_world.write_template(tmp_path / "template", arch)
    theirs, made = template_world.run_here(folder, [(9, 200, 40)]), tmp_path / "made.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, made)
    told = json.loads(i2l(capsys, "inspect", made, "--json")[1])
    assert (told["arch"], told["key_format"], told["modules"], told["finite"]) == (arch.id, "diffsynth", 3, True)
    code, out, _ = i2l(capsys, "check", made, "--json")
    assert code == 0 and "DiffSynth-Studio" in [one["title"] for one in json.loads(out)["consumers"]]
    lora = Lora.read(made)
    for key_format, spec in KEY_FORMATS.items():
        written = tmp_path / f"{key_format}.safetensors"
        assert i2l(capsys, "convert", made, "--to", key_format, "-o", written)[0] == 0
        keys = load_file(written)
        assert all(key.startswith(spec.prefix) for key in keys)
        back = Lora.read(written)
        assert back.arch is arch and set(back) == set(lora)
        for path in lora:
            torch.testing.assert_close(back.delta(path), lora.delta(path), rtol=1e-5, atol=1e-6)


def test_the_grey_pair(tmp_path, capsys, diffsynth_folder):
    repository = template(tmp_path)
    consent.agree(repository, repository.digest)
    code, out, error = i2l(
        capsys, "make", tmp_path / "red.png", "--model", "z-image-v2", "--name", "it", "--lora-dir", tmp_path / "Lora",
        "--grey", "--diffsynth", diffsynth_folder, "--json",
    )  # fmt: skip
    assert code == 0 and "it-grey" in error
    assert inspect(json.loads(out)["file"]).metadata["i2l.grey"] == "it-grey"
    grey = Lora.read(tmp_path / "Lora/it-grey.safetensors")
    theirs = template_world.run_here(repository.folder, [(128, 128, 128)])
    for path in grey:
        torch.testing.assert_close(grey[path][0], theirs[f"{path}.lora_A.default.weight"])
    assert "negative branch" in json.loads((tmp_path / "Lora/it-grey.json").read_text())["description"]


def test_a_run_leaves_the_repository_as_it_was(tmp_path, capsys, diffsynth_folder, monkeypatch):
    """In no cage that shuts it out, and by a Python that was not told to write no compiled code."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setattr(run, "strongest_cage", lambda: BOUNDS)
    repository = template(tmp_path)
    consent.agree(repository, repository.digest)
    before = sorted(path.name for path in repository.folder.rglob("*"))
    asked = ("make", tmp_path / "red.png", "--model", "z-image-v2", "--lora-dir", tmp_path / "Lora", "--diffsynth",
             diffsynth_folder, "--json")  # fmt: skip
    assert [i2l(capsys, *asked, "--name", name)[0] for name in ("one", "two")] == [0, 0]
    assert sorted(path.name for path in repository.folder.rglob("*")) == before


def test_compiled_code_is_refused(tmp_path, capsys):
    repository = template(tmp_path)
    hidden = repository.folder / "__pycache__/model.cpython-311.pyc"
    hidden.parent.mkdir()
    hidden.write_bytes(b"other code")
    with pytest.raises(UserError, match=r"model\.cpython-311\.pyc: is compiled code"):
        _ = repository.digest
    code, _, error = i2l(capsys, "models", "trust", "z-image-v2")
    assert code == 1 and "is compiled code" in error and error.count("\n") == 1


def test_a_pair_belongs_to_the_name_that_was_free(tmp_path, capsys):
    asked = ("make", tmp_path / "red.png", "--model", "mini", "--name", "it", "--lora-dir", tmp_path / "Lora", "--grey")
    assert i2l(capsys, *asked)[0] == i2l(capsys, *asked)[0] == 0
    for name in ("it", "it-2"):
        assert inspect(tmp_path / "Lora" / f"{name}.safetensors").metadata["i2l.grey"] == f"{name}-grey"
        assert (tmp_path / "Lora" / f"{name}-grey.safetensors").is_file()
    (tmp_path / "Lora/it-3-grey.safetensors").write_bytes(b"another's")
    code, _, error = i2l(capsys, *asked)
    assert code == 0 and "it-3-grey was another file" in error
    assert (tmp_path / "Lora/it-3-grey.safetensors").read_bytes() == b"another's"


def test_the_grey_pair_of_a_model_of_the_first_kind(tmp_path, capsys):
    for name, pictures in (("it", [tmp_path / "red.png", tmp_path / "blue.png"]),):
        code, out, _ = i2l(capsys, "make", *pictures, "--model", "mini", "--name", name, "--lora-dir",
                           tmp_path / "Lora", "--grey", "--json")  # fmt: skip
        assert code == 0
    assert inspect(json.loads(out)["file"]).metadata["i2l.grey"] == "it-grey"
    pair = inspect(tmp_path / "Lora/it-grey.safetensors").metadata
    assert "i2l.grey" not in pair and len(json.loads(pair["i2l.images"])) == 2


def test_nothing_is_imported_without_consent(tmp_path, python):
    ran = tmp_path / "ran"
    repository = template(tmp_path, first=f"open({str(ran)!r}, 'w')")

    def attempt():
        return run.template_lora(
            repository, Z_IMAGE, [Image.new("RGB", (8, 8))], python, tmp_path, NO_CALLBACKS, cage=BOUNDS
        )

    with pytest.raises(UserError, match="i2l models trust z-image-v2"):
        attempt()
    assert not ran.exists()
    consent.agree(repository, repository.digest)
    attempt()
    assert ran.exists()
    (repository.folder / "helper.py").write_text("")  # model.py could import it
    repository = TemplateRepository(repository.folder, repository.repo, repository.model)
    ran.unlink()
    with pytest.raises(UserError, match="have not agreed"):
        attempt()
    assert not ran.exists()


def test_consent_is_to_one_hash(tmp_path, capsys):
    repository = template(tmp_path)
    code, out, _ = i2l(capsys, "models", "trust", "z-image-v2", "--json")
    shown = json.loads(out)
    assert (code, shown["digest"], shown["agreed"]) == (0, repository.digest, False)
    assert shown["repo"] == "DiffSynth-Studio/ZImage-i2L-v2" and set(shown["files"]) == {
        "model.py",
        "model.safetensors",
    }
    for wrong in ("0" * 64, repository.digest[:8], ""):
        code, _, error = i2l(capsys, "models", "trust", "z-image-v2", "--agree", wrong)
        assert code == 1 and "not the one named" in error
    assert not consent.has_consent(repository)
    code, out, _ = i2l(capsys, "models", "trust", "z-image-v2", "--agree", repository.digest)
    assert code == 0 and "it may run" in out and "sha256" not in out
    assert i2l(capsys, "models", "trust", "z-image-v2", "--withdraw")[0] == 0
    assert not consent.has_consent(repository)
    assert i2l(capsys, "models", "trust", "mini")[0] == 1
    assert i2l(capsys, "models", "trust", "klein-4b-v2")[0] == 1


@pytest.mark.parametrize("name", ["model.safetensors", ".hidden", "x.sha256", "x.part", "deep/x.lock", "x.so"])
def test_every_file_counts_whatever_a_note_beside_it_says(tmp_path, name):
    """The code can read, and run, whatever lies there."""
    repository = template(tmp_path)
    path = repository.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"good")
    note = {"sha256": "0" * 64, "size": 4, "mtime_ns": path.stat().st_mtime_ns}
    note_path(path).write_text(json.dumps(note))
    before, times = TemplateRepository(repository.folder, "", "").digest, path.stat()
    path.write_bytes(b"evil")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert TemplateRepository(repository.folder, "", "").digest != before


@pytest.mark.parametrize("damage", ["link", "many", "none"])
def test_a_folder_that_is_no_template(tmp_path, damage):
    repository = template(tmp_path)
    if damage == "link":
        (repository.folder / "more").symlink_to(tmp_path)
    elif damage == "many":
        for number in range(501):
            (repository.folder / f"{number}.txt").touch()
    else:
        (repository.folder / "model.py").unlink()
    with pytest.raises(UserError):
        repository.digest  # noqa: B018


def attempt(repository, python, folder, **more):
    return run.template_lora(repository, Z_IMAGE, [Image.new("RGB", (8, 8))], python, folder, NO_CALLBACKS, **more)


def test_a_template_that_fails_is_one_line(tmp_path, python):
    repository = template(tmp_path, result="raise ValueError('two\\nlines \\x1b[31m')")
    consent.agree(repository, repository.digest)
    with pytest.raises(UserError, match="DiffSynth-Studio/ZImage-i2L-v2: its code failed: lines") as raised:
        attempt(repository, python, tmp_path)
    assert str(raised.value).isprintable()


def made_of(tmp_path, change):
    """A template's result after ``change``, checked."""
    made = {f"{path}.lora_{side}.default.weight": torch.ones(size)
            for path, (d_out, d_in) in template_world.layers_of(Z_IMAGE).items()
            for side, size in (("A", (4, d_in)), ("B", (d_out, 4)))}  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in change(made).items()}, tmp_path / "made")
    return run.checked_lora(tmp_path / "made", Z_IMAGE, "they")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda made: {name: tensor * float("nan") for name, tensor in made.items()}, "not finite"),
        (lambda made: made | {next(iter(made)): next(iter(made.values())) * float("inf")}, "not finite"),
        (lambda made: {f"odd.{name}": tensor for name, tensor in made.items()}, "another model"),
        (lambda made: made | {"layers.0.more.lora_A.weight": torch.ones(4, 8)}, "no module"),
        (lambda made: made | {"text_model.x.lora_A.weight": torch.ones(4, 8)}, "no module"),
        (lambda made: {name: tensor.T for name, tensor in made.items()}, "not its shapes"),
        (lambda made: {name: tensor.to(torch.int8) for name, tensor in made.items()}, "floats"),
        (lambda made: {name: tensor.double() for name, tensor in made.items()}, "floats"),
        (lambda made: {str(number): torch.zeros(1) for number in range(30000)}, "tensors"),
        (lambda made: {name: tensor for name, tensor in made.items() if "_A" in name}, "one of its two factors"),
        (lambda made: {f"transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.ones(size)
                       for side, size in (("A", (4, 3072)), ("B", (3072, 4)))}, "a LoRA of Qwen-Image"),
    ],
)  # fmt: skip
def test_what_comes_back_is_not_believed(tmp_path, change, told):
    assert len(made_of(tmp_path, lambda made: made)) == 3
    with pytest.raises(UserError, match=told) as raised:
        made_of(tmp_path, change)
    assert "\n" not in str(raised.value) and raised.value.code == "template_failed"


def test_a_pickle_a_link_or_nothing_in_place_of_the_file(tmp_path, monkeypatch):
    result, target = tmp_path / "lora.safetensors", tmp_path / "taken"
    with pytest.raises(UserError, match="without a LoRA"):
        run.take_result(result, target)
    result.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="without a LoRA"):
        run.take_result(result, target)
    result.unlink()
    monkeypatch.setattr(run, "RESULT_LIMIT", 1000)
    result.write_bytes(bytes(1001))
    with pytest.raises(UserError, match="larger than any"):
        run.take_result(result, target)
    result.write_bytes(pickle.dumps({"a": 1}))
    run.take_result(result, target)
    with pytest.raises(UserError) as raised:
        run.checked_lora(target, Z_IMAGE, "they")
    assert raised.value.code == "template_failed"


def caged_run(tmp_path, code, bounds=None, callbacks=NO_CALLBACKS, cage=None):
    """Some code in the cage, with only this program's Python to read; its scratch folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    reads = [Path(sys.prefix), Path(sys.base_prefix)]
    command = [sys.executable, "-I", "-c", code]
    run.run_caged(
        CagedProcess(command, reads, scratch), cage or strongest_cage(), bounds or run.Bounds(), callbacks, "they"
    )
    return scratch


@linux
@pytest.mark.parametrize(
    ("code", "bounds", "told"),
    [
        ("while True: pass", run.Bounds(seconds=1), "did not end within 1 seconds"),
        (
            "import time\nheld = []\nwhile True: held.append(b'x' * (1 << 24)); time.sleep(0.02)",
            run.Bounds(memory=300 << 20),
            "more than 0.3 GB of memory",
        ),
        (
            "import os, time\nfor _ in range(30):\n    if os.fork() == 0: time.sleep(100)\ntime.sleep(100)",
            run.Bounds(processes=20),
            "started more than 20 processes",
        ),
        (
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\ntime.sleep(9999)",
            run.Bounds(seconds=1),
            "did not end",
        ),
    ],
    ids=["time", "memory", "processes", "left behind"],
)
@pytest.mark.parametrize("cage", list(dict.fromkeys([strongest_cage(), BOUNDS])), ids=lambda cage: cage.name)
def test_it_takes_no_more_than_it_may(tmp_path, code, bounds, told, cage):
    late = time.monotonic() + 15  # so that without a bound this test fails, and leaves nothing behind
    patience = Callbacks(cancelled=lambda: time.monotonic() > late)
    with pytest.raises(UserError, match=told):
        caged_run(tmp_path, code, bounds, patience, cage)
    left = [one for one in Path("/proc").iterdir() if one.name.isdigit() and code.encode() in _command_line(one)]
    assert left == []


def _command_line(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@caged
@pytest.mark.parametrize("what", ["socket", "secret", "write", "packages", "environment"])
def test_what_the_cage_stops(tmp_path, monkeypatch, what):
    """Code that tries it ends with an error, and the last line that it printed is told."""
    monkeypatch.setenv("SOME_TOKEN", "s3cret")
    secret, target, package = (one / "written.txt" for one in (tmp_path / "secret", tmp_path, Path(sys.prefix)))
    secret.parent.mkdir()
    secret.write_text("s3cret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(2)
        code = {
            "socket": f"import socket; socket.create_connection({server.getsockname()!r}, 1)",
            "secret": f"raise ValueError(open({str(secret)!r}).read())",
            "write": f"open({str(target)!r}, 'w')",
            "packages": f"open({str(package)!r}, 'w')",
            "environment": "import os; raise ValueError(os.environ['SOME_TOKEN'])",
        }[what]
        if strongest_cage().name != "bubblewrap" and what in ("secret", "write", "packages"):
            pytest.skip("this cage does not stop it, and says so")
        if what == "write":  # it may write where its scratch lies, but to a disk that goes with it
            caged_run(tmp_path, code)
        else:
            with pytest.raises(UserError, match="its code failed") as raised:
                caged_run(tmp_path, code)
            assert "s3cret" not in str(raised.value)
        written = [one for one in (target, package) if one.exists()]
        package.unlink(missing_ok=True)  # or every later run would fail
        assert written == []
        if what == "socket":
            with pytest.raises(TimeoutError):
                server.accept()


def test_what_the_bounds_alone_do_not_stop_is_said(tmp_path):
    """The sibling of the test above: without a cage the same code runs, and the line for the user says so."""
    target = tmp_path / "written.txt"
    caged_run(tmp_path, f"open({str(target)!r}, 'w')", cage=BOUNDS)
    assert target.exists() and "does not stop: the network, reading and writing your files" in BOUNDS.line


def test_a_user_can_stop_it(tmp_path):
    looks = []
    callbacks = Callbacks(lambda step: None, lambda share: None, lambda: looks.append(1) or len(looks) > 5)
    with pytest.raises(Cancelled):
        caged_run(tmp_path, "import time; time.sleep(100)", callbacks=callbacks)


@pytest.mark.parametrize("named", [None, "missing", "folder", "no-diffsynth"])
def test_a_python_that_cannot_run_it(tmp_path, monkeypatch, named):
    monkeypatch.delenv("I2L_DIFFSYNTH", raising=False)
    told = "--diffsynth"
    if named == "no-diffsynth":
        import venv

        venv.create(tmp_path / named, with_pip=False)
        told = "is not installed there"
    elif named:
        told = "does not run as a Python"
        (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=told) as raised:
        find_python(named and str(tmp_path / named))
    assert "\n" not in str(raised.value)


def test_scratch_is_gone_afterwards(tmp_path, python, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    repository = template(tmp_path, first="raise ValueError('no')")
    consent.agree(repository, repository.digest)
    with pytest.raises(UserError):
        attempt(repository, python, tmp_path)
    assert list((tmp_path / "temporary").iterdir()) == []
