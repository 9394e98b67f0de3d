"""A training run from a start folder: the trainer as a child process, its log, its loss, and the LoRA that it makes.

The trainer runs in its own folder with its own Python, by a list of arguments. It ends with us, whatever ends us.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import IO, TYPE_CHECKING, Any, cast

from i2l_ext.converters.errors import UserError, one_line
from i2l_ext.operations.context import Context, Step
from i2l_ext.process_tree import supervised

if TYPE_CHECKING:
    from i2l_ext.converters.trainers import Trainer
    from i2l_ext.requests import RunRequest

LINES = 40
"""Of the log that are shown while it runs."""

POINTS = 200
"""Of the loss that are kept: of more, every second is left out."""

ASK_SECONDS = 0.1
TELL_SECONDS = 1.0

LOG = "train.log"

_STEP = re.compile(r"(?<![\d.])(\d+)/(\d+) \[")
_LONE_STEP = re.compile(r"\bsteps?: (\d+)\b")
_LOSS = re.compile(r"(?<!smooth )\b(?:avr_|step_|train_)?loss[=:]\s*([-+]?\d[\d.]*(?:[eE][-+]?\d+)?|nan)")

_ERROR = re.compile(r"(?:\[[^\]]*\]:? *)*((?:[A-Za-z_][\w.]*(?:Error|Exception)(?=: |$)|[\w.-]+: error: ).*)")
"""The line of a log that names an error: the end of a traceback, with a process's number before it, or argparse's."""

PYTHONS = tuple(
    f"{environment}/{python}"
    for environment in (".venv", "venv", "env")
    for python in ("bin/python", "Scripts/python.exe")
)
"""Where an environment inside a trainer's folder has its Python."""


@dataclass(frozen=True)
class LogLine:
    """What a line of a trainer's log tells; None for what it does not."""

    step: int | None = None
    steps: int | None = None
    loss: float | None = None


@dataclass(frozen=True)
class RunResult:
    """A LoRA that a trainer made. ``source``: the file that it wrote, of which ``file`` is a copy; ``losses``: [step,
    loss], thinned out; ``check``: as in CheckResult."""

    file: Path
    source: Path
    trainer: str
    name: str
    arch: str
    rank: int
    modules: int
    seconds: float
    losses: tuple[tuple[int, float], ...]
    check: Mapping[str, Any]

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "file": str(self.file), "source": str(self.source)}


def parse_line(line: str) -> LogLine:
    """Read the progress of a trainer from a line of its log: the bars of tqdm, or `step: N … loss: X`."""
    bars = list(_STEP.finditer(line))
    lone = _LONE_STEP.search(line)
    loss = _LOSS.search(line)
    step, steps = (int(bars[-1][1]), int(bars[-1][2])) if bars else (int(lone[1]) if lone else None, None)
    return LogLine(step, steps, float(loss[1]) if loss else None)


def run_trainer(request: RunRequest, context: Context) -> RunResult:
    """Run the trainer of a start folder to its end, and save the LoRA that it wrote last.

    Raises UserError where the folders are not what they should be, where the trainer fails, and where what it wrote is
    no usable LoRA; Cancelled once it and all that it started has ended.
    """
    from i2l_ext.converters import atomic
    from i2l_ext.converters.trainers.script import NOT_STARTED

    trainer, name = read_start(request.folder)
    home = _home(request.trainer_folder, trainer)
    output = request.output or request.folder.resolve().with_name(f"{name}.safetensors")
    if output.exists() and not request.overwrite:
        raise UserError(f"{output}: exists already. Choose another name, or say --overwrite.")
    script = request.folder.resolve() / "train.py"
    words = [str(_python(request.python, home)), str(script)]
    began = time.time()
    context.reporter.plan([Step("run", "run")])
    context.reporter.begin("run")
    watch = _Watch(context)
    code = _run(words, home, script.with_name(LOG), watch, context)
    if code == NOT_STARTED:
        raise UserError(f"Nothing was started. {' '.join(watch.lines)}", "trainer_failed")
    if code:
        why = (watch.cause or watch.last or "it said nothing").rstrip(".")
        raise UserError(
            f"{trainer.title} ended with code {code}: {why}. The whole log is {LOG} in the start folder.",
            "trainer_failed",
        )
    found = _newest(home, trainer, name, began)
    told = _inspected(found, output, context)
    with atomic.atomic_path(output, overwrite=request.overwrite) as part:
        shutil.copyfile(found, part)
        context.reporter.begin_saving()
    return RunResult(
        output, found, trainer.id, name, seconds=round(time.time() - began, 1), losses=tuple(watch.losses), **told
    )


def read_start(folder: Path) -> tuple[Trainer, str]:
    """The trainer of a start folder, and the name of its run. Raises UserError where it is none."""
    from i2l_ext.converters.files import TensorFile
    from i2l_ext.converters.trainers import TRAINERS

    for path in sorted(folder.glob("*_init_r*.safetensors")) if (folder / "train.py").is_file() else ():
        with TensorFile(path) as file:
            said = file.header.metadata
        trainer, name = TRAINERS.get(said.get("i2l.export", "")), said.get("i2l.run", "")
        if trainer is not None and re.fullmatch(r"[A-Za-z0-9._][A-Za-z0-9._-]*", name):
            return trainer, name
    raise UserError(f"{folder}: is no start folder of this version. Write one: i2l export FILE --for TRAINER.")


def _home(folder: Path, trainer: Trainer) -> Path:
    if not (folder / trainer.home).exists():
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder.")
        raise UserError(f"{folder}: is not the folder of {trainer.title}: {trainer.home} is not in it.")
    return folder.resolve()


def _python(named: Path | None, home: Path) -> Path:
    """The Python of a trainer. It is not resolved: that of an environment is a link to one that is none."""
    if named is not None:
        if not named.is_file():
            raise UserError(f"{named}: there is no such Python.")
        return named.absolute()
    found = next((home / one for one in PYTHONS if (home / one).is_file()), None)
    if found is None:
        raise UserError(f"{home}: no Python environment was found in it (.venv, venv). Name the trainer's Python.")
    return found


class _Watch:
    """What the log has told so far."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.lines: deque[str] = deque(maxlen=LINES)
        self.losses: list[tuple[int, float]] = []
        self.cause = ""
        """The first error since the last step that was new: those after it are of the programs that started it."""
        self._every, self._told, self._bar, self._step = 1, 0.0, False, -1

    @property
    def last(self) -> str:
        """The last line that is no bar."""
        return next((line for line in reversed(self.lines) if not _STEP.search(line)), "")

    def hear(self, line: str, bar: bool) -> None:
        """Take a line; a ``bar`` is written over by the next one."""
        if self._bar and self.lines:
            self.lines.pop()
        self.lines.append(one_line(line))
        self._bar = bar
        seen = parse_line(line)
        if seen.step is not None and seen.step != self._step:  # a bar is drawn once more when a run breaks off
            self._step, self.cause = seen.step, ""
        elif not self.cause and (error := _ERROR.fullmatch(self.lines[-1])):
            self.cause = error[1]
        if seen.step is not None and seen.steps:
            self._context.reporter.progress(min(seen.step / seen.steps, 1.0))
        if seen.step is not None and seen.loss is not None and seen.loss == seen.loss:
            self._keep(seen.step, seen.loss)
        self.tell()

    def _keep(self, step: int, loss: float) -> None:
        if step % self._every or (self.losses and self.losses[-1][0] >= step):
            return
        self.losses.append((step, loss))
        if len(self.losses) > POINTS:
            self.losses, self._every = self.losses[1::2], 2 * self._every

    def tell(self, now: bool = False) -> None:
        """Show the end of the log and the loss, not too often."""
        if now or time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            self._context.reporter.log(list(self.lines), self.losses)


def _run(words: list[str], home: Path, log: Path, watch: _Watch, context: Context) -> int:
    """Run a command in a folder until it ends; its exit code. Raises Cancelled once all that it started has ended."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    for ours in ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(ours, None)
    process = subprocess.Popen(
        supervised(words), cwd=home, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )  # fmt: skip
    stdin, stdout = cast("tuple[IO[bytes], IO[bytes]]", (process.stdin, process.stdout))
    heard: Queue[tuple[str, bool] | None] = Queue()
    Thread(target=_read, args=(stdout, log, heard), daemon=True).start()
    try:
        while True:
            context.reporter.check()
            try:
                line = heard.get(timeout=ASK_SECONDS)
            except Empty:
                watch.tell()
                continue
            if line is None:
                break
            watch.hear(*line)
        watch.tell(now=True)
        return process.wait()
    finally:
        stdin.close()  # the supervisor ends all that still runs
        process.wait()


def _read(stream: IO[bytes], log: Path, heard: Queue[tuple[str, bool] | None]) -> None:
    """Put the lines of a stream into a queue, and all of it into the log; None at its end."""
    with log.open("ab") as kept:
        for line, bar in _lines(stream, kept):
            if text := line.decode(errors="replace").strip():
                heard.put((text, bar))
    heard.put(None)


def _lines(stream: IO[bytes], kept: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """The lines of a stream, and whether each is a bar, which ends in a carriage return."""
    rest = b""
    while piece := os.read(stream.fileno(), 1 << 16):
        kept.write(piece)
        kept.flush()
        *whole, rest = re.split(rb"(?<=[\r\n])", rest + piece)
        if len(rest) > 1 << 16:
            whole, rest = [*whole, rest], b""
        for line in whole:
            yield line, line.endswith(b"\r")
    yield rest, False


def _newest(home: Path, trainer: Trainer, name: str, began: float) -> Path:
    """The LoRA that a run wrote last."""
    found = [path for path in home.glob(trainer.results.format(name=name)) if path.stat().st_mtime >= began - 2]
    if not found:
        raise UserError(f"{trainer.title} ended without a LoRA in {home / trainer.results.format(name=name)}.")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, -len(path.name)))


def _inspected(path: Path, output: Path, context: Context) -> dict[str, Any]:
    """What the LoRA of a trainer is, and who loads it. Raises UserError where it is none of a known model, or has NaN
    or infinite values."""
    from i2l_ext.converters import inspection
    from i2l_ext.operations.lora_reports import check_lora
    from i2l_ext.requests import CheckRequest

    found = inspection.inspect(path)
    if not found.finite:
        raise UserError(f"{path.name}: the training made values that are no numbers. Try a lower learning rate.")
    check = check_lora(CheckRequest(path), context).json()
    return {
        "arch": found.arch.id, "rank": max(found.ranks, default=0), "modules": len(found.reading.modules),
        "check": {**check, "file": str(output)},
    }  # fmt: skip
