"""What comes from elsewhere: nothing unasked, nothing that runs, and under which licences."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = [path for folder in ("i2l_ext", "converters", "scripts") for path in (ROOT / folder).rglob("*.py")]
OURS += [ROOT / "install.py"]

DEAF = """
import socket, sys
def refuse(*_, **__):
    raise RuntimeError("the network was asked")
for name in ("connect", "connect_ex", "bind", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = socket.gethostbyname = refuse
"""
"""No socket of this process leads anywhere."""

MAIN = "from i2l_ext.commands.main import main"

STARTS = {
    "import": "import i2l_ext, i2l_ext.pipeline, i2l_ext.worker.main, i2l_ext.webui.extension, i2l_ext.hooks.musubi",
    "the extension": "sys.path.insert(0, 'tests/fake_host'); import runpy; runpy.run_path('scripts/image_to_lora.py')\n"
    "import modules.script_callbacks as c; [f() for f in c.settings]; assert [f() for f in c.tabs]",
    "install.py in a host": "import install; sys.exit(install.main([]))",
    "i2l --help": f"{MAIN}; sys.exit(main(['--help']))",
    "i2l models": f"{MAIN}; sys.exit(main(['models']))",
    "i2l make": f"{MAIN}; sys.exit(main(['make', 'none.png', '--model', 'qwen-image-style']))",
}


@pytest.mark.parametrize("what", STARTS)
def test_nothing_is_fetched_at_import_or_start(what, tmp_path):
    if what == "the extension":
        pytest.importorskip("gradio")
    environment = {**os.environ, "FAKE_ROOT": str(tmp_path), "I2L_STATE": str(tmp_path / "state"),
                   "I2L_MODELS": str(tmp_path / "models"), "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, "-c", DEAF + STARTS[what]]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    said = ended.stdout + ended.stderr
    assert "the network was asked" not in said and "Traceback" not in said, said
    assert ended.returncode == (1 if what == "i2l make" else 0), said


def test_the_network_would_have_been_noticed():
    command = [sys.executable, "-c", DEAF + "import urllib.request as u; u.urlopen('http://127.0.0.1:9')"]
    assert "the network was asked" in subprocess.run(command, capture_output=True, text=True).stderr


UNPICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNS = {"eval", "exec", "compile", "__import__"}
OPENS = {("torch", "load"), ("torch.hub", "load"), ("np", "load"), ("numpy", "load"), ("yaml", "load"),
         ("yaml", "unsafe_load"), ("runpy", "run_path"), ("os", "system"), ("torch.jit", "load")}  # fmt: skip


def faults(text):
    """What in a module's text unpickles, runs code that is given as data, or trusts a repository."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from UNPICKLES.intersection(name.split(".")[0] for name in named)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            owner, _, name = called.rpartition(".")
            words = {word.arg: word.value for word in node.keywords}
            if (owner, name) in OPENS or called in RUNS or "trust_remote_code" in words or "shell" in words:
                yield called
            if name == "from_pretrained" and not any(
                w.arg is None and ast.unparse(w.value) == "SAFE_LOADING" for w in node.keywords
            ):
                yield called
        elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "auto_map"):
            yield node.value


ASKED_FOR = {
    "i2l_ext/hooks/musubi.py": ["runpy.run_path"],  # the trainer's own script, which the user names to be run
    "i2l_ext/v2_models/child.py": ["template.TemplatePipeline.from_pretrained"],  # shut in, and after consent
}
"""Where code of others runs, as the user has asked."""


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled_and_no_code_comes_with_weights(path):
    name = path.relative_to(ROOT).as_posix()
    assert list(faults(path.read_text(encoding="utf-8"))) == ASKED_FOR.get(name, [])


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from dill import load", "torch.load(x)", "torch.load(x, weights_only=True)", "np.load(x)",
     "f(trust_remote_code=False)", "f(**{'trust_remote_code': True})", "M.from_pretrained(x)", "eval(x)",
     "subprocess.run(x, shell=True)", "torch.hub.load(x)", "yaml.load(x)"],
)  # fmt: skip
def test_such_things_would_be_seen(text):
    assert list(faults(text))
    assert not list(faults("heads.eval(); M.from_pretrained(x, **SAFE_LOADING); re.compile(x); yaml.safe_load(x)"))


def test_what_from_pretrained_is_told():
    from i2l_ext.training.qwen_image import SAFE_LOADING

    assert SAFE_LOADING == {"local_files_only": True, "use_safetensors": True}


def test_weights_come_from_the_catalogue_alone():
    """Every repository is named there, as ``owner/name``, and nothing but safetensors and their index is fetched,
    and the code of templates."""
    from i2l_ext.models import catalogue

    fetched = [part for model in catalogue.MODELS.values() for part in model.parts if part.repo]
    assert fetched
    for part in fetched:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", part.repo) and ".." not in part.repo
        for file in part.files:
            code = file == "model.py" and part.kind == "template"  # it runs only after consent (test_templates)
            assert code or file.endswith((".safetensors", ".safetensors.index.json"))
            assert not file.startswith("/") and ".." not in file and "\\" not in file
    ended = subprocess.run(
        [sys.executable, "-m", "i2l_ext", "models", "download", "someone/weights"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and "someone/weights" in ended.stderr


FREE = re.compile(
    r"MIT|BSD|Apache|ISC|MPL|Mozilla|PSF|Python Software Foundation|CNRI|Zlib|CC0|Unlicense|Public Domain|HPND|BSL",
    re.IGNORECASE,
)


def test_the_licences_of_all_dependencies_are_listed():
    """Each states one, and none asks of us what Apache-2.0 does not give. NVIDIA's CUDA packages have their own."""
    command = [sys.executable, "-m", "i2l_ext", "doctor", "--licences", "--json"]
    told = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert {"i2l", "torch", "transformers", "safetensors", "numpy", "pillow", "typing-extensions"} <= set(told)
    for name, text in told.items():
        if not name.startswith(("nvidia-", "cuda-")):
            version, _, licence = text.partition(": ")
            assert version[0].isdigit() and FREE.search(licence), (name, text)
            assert not re.search(r"(?<!L)GPL|Affero", licence), (name, text)
