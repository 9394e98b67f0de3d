"""The training loop: one for everything that is trained here.

All chance comes from (seed, task, step), drawn for the whole batch before the processes take their shares of it.
So there is no state of a random generator to keep, a resumed run goes on as the unbroken one would have, and N
processes see together what one would see.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from i2l_ext.converters.atomic import atomic_path
from i2l_ext.converters.files import load_file, save_file

from .config import Schedule
from .muon import BETAS, Muon


@dataclass(frozen=True)
class Task:
    """Something to train. ``loss(module, rng, mine)`` is one step's: it draws for ``schedule.batch`` samples from
    ``rng`` and works on the slice ``mine`` of them."""

    name: str
    module: nn.Module
    loss: Callable[[nn.Module, torch.Generator, slice], torch.Tensor]
    schedule: Schedule
    seed: int = 0

    def rng(self, step: int) -> torch.Generator:
        key = zlib.crc32(f"{self.seed} {self.name} {step}".encode())
        return torch.Generator().manual_seed(key)


def rate(schedule: Schedule, step: int) -> float:
    """Learning rate: a linear warm-up, then a cosine down to 2 %."""
    rising = min(1.0, (step + 1) / max(1, schedule.warmup))
    return schedule.learning_rate * rising * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / schedule.steps))


def optimizer_of(schedule: Schedule, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    decay = schedule.weight_decay
    if schedule.matrix_rate:
        return Muon(params, schedule.learning_rate, schedule.matrix_rate / schedule.learning_rate, decay)
    return torch.optim.AdamW(params, lr=schedule.learning_rate, betas=BETAS, weight_decay=decay)


def train(task: Task, folder: Path, accelerator: Accelerator, say: Callable[[str], None] = print) -> None:
    """Trains ``task.module`` in place, going on from the checkpoint in ``folder`` if there is one.

    At the end the module holds the averaged weights (where the schedule has an average), on every process alike.
    """
    schedule = task.schedule
    module = task.module
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = optimizer_of(schedule, list(trained.values()))
    wrapped, stepper = accelerator.prepare(module, optimizer)
    average = {name: p.detach().clone() for name, p in trained.items()}
    checkpoint = Checkpoint(folder, module, optimizer, average)
    step = checkpoint.load()
    metrics = Metrics(folder.parent / "metrics.jsonl", task.name, step, accelerator.is_main_process)
    share = schedule.batch // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)

    wrapped.train()
    while step < schedule.steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(schedule, step)
        loss = task.loss(wrapped, task.rng(step), mine)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(module.parameters(), schedule.clip)
        stepper.step()
        stepper.zero_grad()
        with torch.no_grad():
            # The average follows fast at first, so that it does not remember the start.
            follow = max(1 - schedule.average, 9 / (step + 10))
            torch._foreach_lerp_(list(average.values()), list(trained.values()), min(1.0, follow))
        step += 1
        metrics.add(accelerator.reduce(loss.detach(), "mean"), norm)
        if step % schedule.log_every == 0 or step == schedule.steps:
            say(metrics.write(step, rate(schedule, step)))
        if step % schedule.save_every == 0 and accelerator.is_main_process:
            checkpoint.save(step)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(average[name])
    module.eval()
    accelerator.free_memory()


@dataclass
class Checkpoint:
    """Everything a run needs to go on: weights, their average, the optimiser's moments and the step, in one file.

    The file appears whole or not at all, and its name carries the step: the newest whole one counts.
    """

    folder: Path
    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, torch.Tensor]

    def save(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        older = list(self._files())
        with atomic_path(self.folder / f"step-{step:07d}.safetensors", overwrite=True) as part:
            save_file(dict(self._tensors()), part)
        for _, path in older:
            path.unlink(missing_ok=True)

    def load(self) -> int:
        """The step that it went on from, 0 without a checkpoint."""
        files = sorted(self._files())
        if not files:
            return 0
        step, path = files[-1]
        saved = load_file(path)
        own = {f"{kind}/{name}" for kind in ("weight", "average") for name in self.average}
        trained = dict(self._trained())
        with torch.no_grad():
            for key in saved.keys() - own:
                kind, _, name = key.partition("/")
                self.optimizer.state[trained[name]][kind] = torch.empty_like(saved[key])
            for key, value in self._tensors():
                value.copy_(saved[key])
        return step

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, p in self._trained():
            yield f"weight/{name}", p
            yield f"average/{name}", self.average[name]
            for kind, value in self.optimizer.state.get(p, {}).items():  # none where no gradient ever came
                yield f"{kind}/{name}", value

    def _files(self) -> Iterator[tuple[int, Path]]:
        for path in self.folder.glob("step-*.safetensors"):
            with suppress(ValueError):
                yield int(path.stem.removeprefix("step-")), path


class Metrics:
    """One line of JSON every so many steps: task, step, mean loss, gradient norm, learning rate, seconds."""

    def __init__(self, path: Path, task: str, step: int, writes: bool) -> None:
        self.path, self.task, self.writes = path, task, writes
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.since = time.monotonic()
        if writes and path.exists():
            # What was logged after the checkpoint will be done, and logged, again.
            kept = [line for line in read_metrics(path) if line["task"] != task or line["step"] <= step]
            with atomic_path(path, overwrite=True) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def add(self, loss: torch.Tensor, norm: torch.Tensor | None) -> None:
        self.losses.append(loss)
        if norm is not None:
            self.norms.append(torch.as_tensor(norm))

    def write(self, step: int, learning_rate: float) -> str:
        now = time.monotonic()
        line = {
            "task": self.task,
            "step": step,
            "loss": round(torch.stack(self.losses).mean().item(), 6),
            "norm": round(torch.stack(self.norms).mean().item(), 4) if self.norms else None,
            "rate": round(learning_rate, 8),
            "seconds": round(now - self.since, 2),
        }
        self.losses, self.norms, self.since = [], [], now
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        return f"{self.task} {step}: loss {line['loss']:.4f}, {line['seconds']:.0f} s"


def read_metrics(path: Path) -> list[dict]:
    """The lines of a log; a last one that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines
