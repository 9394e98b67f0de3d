"""A trainer that is run from a start folder: a stand-in of ai-toolkit, started by the train.py of an export."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.architectures import MINI, QWEN_IMAGE
from i2l_ext.converters.errors import Cancelled
from i2l_ext.converters.export import export
from i2l_ext.operations import Context, Reporter
from i2l_ext.operations.training_run import parse_line, read_start, run_trainer
from i2l_ext.requests import RunRequest
from test_converters_commands import i2l
from test_trainers import style

TRAINER = """
import json, pathlib, re, shutil, subprocess, sys, time
config = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")
init, name = (json.loads(re.search(key + ': (".*")', config)[1]) for key in ("pretrained_lora_path", "name"))
mode = pathlib.Path("mode").read_text()
print("Missing keys: []")
if mode == "fails":
    print("ValueError: it went wrong")
    sys.exit(5)
if mode == "breaks":
    print("ImportError: an optional package is missing")
    print("\\r10%|#| 1/4 [00:01<00:03, loss: 0.5]", flush=True)
    print("[rank0]: Traceback (most recent call last):\\n[rank0]:   File 'x', line 1\\n"
          "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\\n"
          "During handling of the above exception, another exception occurred:\\nRuntimeError: worker 0 is gone")
    print("\\r10%|#| 1/4 [00:01<00:03, loss: 0.5]", flush=True)
    print("subprocess.CalledProcessError: Command 'python' returned non-zero exit status 1.\\nstopped")
    sys.exit(1)
if mode == "argument":
    print("usage: train.py [-h]\\ntrain.py: error: unrecognized arguments: --depth")
    print("Traceback (most recent call last):\\nsubprocess.CalledProcessError: Command 'python' returned 2")
    sys.exit(1)
if mode == "waits":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    pathlib.Path("child").write_text(str(child.pid))
    time.sleep(60)
for step in range(1, 5):
    print(f"\\r{name}:  25%|##| {step}/4 [00:01<00:03, lr: 1.0e-04 loss: {1 / step:.3e}]", end="", flush=True)
print("\\ndone")
out = pathlib.Path("output", name)
out.mkdir(parents=True)
if mode != "nothing":
    shutil.copy(init, out / f"{name}_000000002.safetensors")
    time.sleep(0.05)
    (out / f"{name}.safetensors").write_bytes(b"no LoRA" if mode == "damaged" else pathlib.Path(init).read_bytes())
"""


def one_layer():
    """A LoRA of a model that a trainer has."""
    return style(QWEN_IMAGE, paths=["transformer_blocks.0.attn.to_q"])


def as_if_a_trainer_had_it(folder):
    """Let the train.py of a LoRA of mini start the stand-in."""
    script = folder / "train.py"
    text = script.read_text(encoding="utf-8")
    assert "missing = ['This LoRA is of mini" in text
    script.write_text(re.sub(r"^missing = .*", "missing = []", text, flags=re.MULTILINE), encoding="utf-8")


@pytest.fixture
def home(tmp_path):
    """The stand-in's folder."""
    home = tmp_path / "ai toolkit"
    (home / "toolkit").mkdir(parents=True)
    (home / "toolkit/config_modules.py").touch()
    (home / "run.py").write_text(TRAINER)
    return home


@pytest.fixture
def start(tmp_path):
    pictures = {"1.png": lambda path: Image.new("RGB", (64, 64)).save(path)}
    export(one_layer(), "ai-toolkit", 4, tmp_path / "my start", stem="meadow", pictures=pictures)
    return tmp_path / "my start"


class Heard(Reporter):
    def __init__(self, stop=None):
        self.lines, self.losses, self.shares, self._stop = [], [], [], stop

    def log(self, lines, losses):
        self.lines, self.losses = list(lines), list(losses)

    def progress(self, share):
        self.shares.append(share)

    def cancelled(self):
        return self._stop is not None and self._stop()


def request(start, home, mode, **more):
    (home / "mode").write_text(mode)
    return RunRequest(start, home, Path(sys.executable), **more)


def test_a_run_is_watched_and_its_lora_taken(start, home, tmp_path):
    heard = Heard()
    made = run_trainer(request(start, home, "trains", output=tmp_path / "new.safetensors"), Context(reporter=heard))
    assert made.file == tmp_path / "new.safetensors" and Lora.read(made.file).rank == made.rank == 4
    assert made.source.name == f"{read_start(start)[1]}.safetensors"  # the last, not the checkpoint of step 2
    assert made.losses == ((1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25)) and heard.shares == [0.25, 0.5, 0.75, 1.0]
    assert heard.lines[0] == "Missing keys: []" and heard.lines[-1] == "done" and len(heard.lines) == 3
    assert "Missing keys" in (start / "train.log").read_text()
    assert made.json()["check"]["consumers"] and made.trainer == "ai-toolkit"


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("fails", "ended with code 5: ValueError: it went wrong"),
        (
            "breaks",
            r"code 1: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB. The whole log is train",
        ),
        ("argument", r"code 1: train.py: error: unrecognized arguments: --depth. The whole log"),
        ("nothing", "ended without a LoRA"),
        ("damaged", "safetensors"),
    ],
)
def test_what_went_wrong_is_told_and_nothing_is_written(start, home, tmp_path, mode, why):
    with pytest.raises(UserError, match=why):
        run_trainer(request(start, home, mode, output=tmp_path / "new.safetensors"), Context())
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))


def test_nothing_starts_where_something_is_missing(start, home, tmp_path):
    asked = request(start, home, "trains")
    (tmp_path / "there.safetensors").touch()
    for wrong, why in (
        (RunRequest(tmp_path, home, asked.python), "is no start folder"),
        (
            RunRequest(start, tmp_path, asked.python),
            "not the folder of ai-toolkit: toolkit/config_modules.py is not in",
        ),
        (RunRequest(start, tmp_path / "nowhere", asked.python), "nowhere: no such folder."),
        (RunRequest(start, home), "no Python environment"),
        (RunRequest(start, home, tmp_path / "python"), "no such Python"),
        (RunRequest(start, home, asked.python, tmp_path / "there.safetensors"), "exists already"),
    ):
        with pytest.raises(UserError, match=why):
            run_trainer(wrong, Context())
    assert not (home / "output").exists()
    (home / "run.py").unlink()
    next(start.glob("*_init_*")).with_suffix(".txt").touch()
    text = (start / "config.yaml").read_text()
    (start / "config.yaml").write_text(f'{text}# "path/to/one"\n# "path/to/two"\n')
    with pytest.raises(
        UserError, match=r"^Nothing was started\. run\.py is not in this folder.*to/one.*to/two"
    ) as told:
        run_trainer(asked, Context())
    assert "ended with code" not in str(told.value)


def test_a_run_with_a_place_to_fill_in_says_which(home, tmp_path):
    export(one_layer(), "ai-toolkit", 4, tmp_path / "start")
    with pytest.raises(UserError, match=r"Nothing was started\. .*config.yaml, line \d+: fill in this path: "):
        run_trainer(request(tmp_path / "start", home, "trains"), Context())


def test_a_start_of_the_test_model_starts_nothing(home, tmp_path):
    pictures = {"1.png": Image.new("RGB", (64, 64)).save}
    export(style(MINI), "ai-toolkit", 4, tmp_path / "start", pictures=pictures)
    with pytest.raises(UserError, match=r"^Nothing was started\. This LoRA is of mini, the test model: no "):
        run_trainer(request(tmp_path / "start", home, "trains"), Context())
    assert not (home / "output").exists()


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the tree of processes is seen on Linux only")
def test_cancel_ends_all_that_the_trainer_has_started(start, home):
    child = home / "child"
    seen = []

    def stop():
        if child.exists() and child.read_text():
            seen.append(time.monotonic())
        return len(seen) > 12  # a second later: the supervisor has seen the whole tree

    with pytest.raises(Cancelled):
        run_trainer(request(start, home, "waits"), Context(reporter=Heard(stop)))
    assert not alive(int(child.read_text()))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the tree of processes is seen on Linux only")
def test_the_trainer_ends_with_an_engine_that_is_killed(start, home):
    import subprocess

    asked = request(start, home, "waits")
    code = (
        "import sys; from pathlib import Path; from i2l_ext.operations import Context; "
        "from i2l_ext.operations.training_run import run_trainer; from i2l_ext.requests import RunRequest; "
        f"run_trainer(RunRequest(Path({str(asked.folder)!r}), Path({str(home)!r}), Path(sys.executable)), Context())"
    )
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    engine = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment)
    child = home / "child"
    end = time.monotonic() + 60
    while not (child.exists() and child.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1)
    engine.kill()
    engine.wait()
    pid, end = int(child.read_text()), time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(pid)


LINES = {
    "steps:  12%|#| 120/1000 [01:00<07:00, 1.9it/s, avr_loss=0.123]": (120, 1000, 0.123),  # musubi-tuner
    "x_i2l_r4:  10%|#| 25/250 [00:10<01:30, 2.5it/s, lr: 1.0e-04 loss: 4.123e-01]": (25, 250, 0.4123),  # ai-toolkit
    " 10%|#         | 40/400 [00:10<01:30,  4.0it/s]": (40, 400, None),  # DiffSynth-Studio
    "Steps:   1%|1| 10/2000 [00:05<16:35, 2.0it/s, loss=0.51, lr=0.0001]": (10, 2000, 0.51),  # diffusers, FlyMyAI
    "Epoch 1/1, Steps:  12%|#| 12/100 [00:12<01:28, 1.0it/s, step_loss=0.4, lr=1e-5]": (12, 100, 0.4),  # SimpleTuner
    "step:  50%|#####| 10/20 [00:10<00:10, 1.0it/s, loss=0.12, smooth loss=0.3]": (10, 20, 0.12),  # OneTrainer
    "steps: 10 loss: 0.0625 iter time (s): 1.5 samples/sec: 0.6": (10, None, 0.0625),  # diffusion-pipe
    "Loading checkpoint shards: 3 of 4": (None, None, None),
}


@pytest.mark.parametrize("line", LINES)
def test_lines_of_the_trainers_logs(line):
    told = parse_line(line)
    assert (told.step, told.steps, told.loss) == LINES[line]


def test_command(start, home, tmp_path, capsys):
    (home / "mode").write_text("trains")
    words = ("run", start, "--in", home, "--python", sys.executable, "-o", tmp_path / "new.safetensors")
    assert i2l(*words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 4
    with pytest.raises(UserError, match="exists already"):
        i2l(*words)
