"""The training loop, the same for everything that is trained here.

Random numbers depend only on seed, task and step. They are drawn for the whole batch; then each process takes its
share. So no generator's state has to be saved, a resumed run matches an unbroken one, and N processes together see
what one process would see.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from i2l_ext.converters import files
from i2l_ext.converters.atomic import atomic_path
from i2l_ext.converters.files import load_file

from .config import Schedule
from .metrics import MetricsLog
from .muon import BETAS, Muon


@dataclass(frozen=True)
class TrainingTask:
    """A module and how it is trained.

    ``loss(module, rng, local)`` is the loss of one step, a scalar. It draws for ``schedule.batch`` samples from
    ``rng`` and computes those in the slice ``local``. ``name`` is part of the random seed.
    """

    name: str
    module: nn.Module
    loss: Callable[[nn.Module, torch.Generator, slice], torch.Tensor]
    schedule: Schedule
    seed: int = 0

    def rng(self, step: int) -> torch.Generator:
        """The random generator of a step."""
        key = zlib.crc32(f"{self.seed} {self.name} {step}".encode())
        return torch.Generator().manual_seed(key)


def learning_rate_at(schedule: Schedule, step: int) -> float:
    """A linear warm-up, then a cosine down to 2 %."""
    warmup = min(1.0, (step + 1) / max(1, schedule.warmup))
    return schedule.learning_rate * warmup * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / schedule.steps))


def build_optimizer(schedule: Schedule, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Muon where the schedule has a rate for matrices, else AdamW."""
    decay = schedule.weight_decay
    if schedule.matrix_rate:
        return Muon(params, schedule.learning_rate, schedule.matrix_rate / schedule.learning_rate, decay)
    return torch.optim.AdamW(params, lr=schedule.learning_rate, betas=BETAS, weight_decay=decay)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """By name, in the module's order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def train_task(
    task: TrainingTask, folder: Path, accelerator: Accelerator, report: Callable[[str], None] = print
) -> None:
    """Train ``task.module`` in place, from the checkpoint in ``folder`` if there is one.

    At the end the module holds the averaged weights, on every process. ``report`` gets a line of text for each line
    of metrics.
    """
    schedule, module = task.schedule, task.module
    trained = trainable_parameters(module)
    optimizer = build_optimizer(schedule, list(trained.values()))
    wrapped, prepared_optimizer = accelerator.prepare(module, optimizer)
    average = {name: p.detach().clone() for name, p in trained.items()}
    checkpoint = TrainingCheckpoint(folder, module, optimizer, average)
    step = checkpoint.load()
    metrics = MetricsLog(folder.parent / "metrics.jsonl", task.name, step, accelerator.is_main_process)
    share = schedule.batch // accelerator.num_processes
    local = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)

    wrapped.train()
    while step < schedule.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(schedule, step)
        loss = task.loss(wrapped, task.rng(step), local)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(module.parameters(), schedule.clip)
        prepared_optimizer.step()
        prepared_optimizer.zero_grad()
        with torch.no_grad():
            # The average moves fast at first, so that it forgets the initial weights.
            move = max(1 - schedule.average, 9 / (step + 10))
            torch._foreach_lerp_(list(average.values()), list(trained.values()), min(1.0, move))
        step += 1
        metrics.add(accelerator.reduce(loss.detach(), "mean"), norm)
        if step % schedule.log_every == 0 or step == schedule.steps:
            report(metrics.write(step, learning_rate_at(schedule, step)))
        if step % schedule.save_every == 0 and accelerator.is_main_process:
            checkpoint.save(step)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(average[name])
    module.eval()
    accelerator.free_memory()


@dataclass
class TrainingCheckpoint:
    """Weights, their average and the optimiser's state at a step, in one file ``step-N.safetensors`` of ``folder``.

    The file appears whole or not at all, so the newest one counts.
    """

    folder: Path
    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, torch.Tensor]

    def save(self, step: int) -> None:
        """Write the checkpoint, then remove the older ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        older = list(self._files())
        save_tensors(self.folder / f"step-{step:07d}.safetensors", dict(self._tensors()))
        for _, path in older:
            path.unlink(missing_ok=True)

    def load(self) -> int:
        """Load the newest checkpoint in place; its step, 0 where there is none."""
        found = sorted(self._files())
        if not found:
            return 0
        step, path = found[-1]
        saved = load_file(path)
        not_state = {f"{kind}/{name}" for kind in ("weight", "average") for name in self.average}
        trained = trainable_parameters(self.module)
        with torch.no_grad():
            for key in saved.keys() - not_state:
                kind, _, name = key.partition("/")
                self.optimizer.state[trained[name]][kind] = torch.empty_like(saved[key])
            for key, value in self._tensors():
                value.copy_(saved[key])
        return step

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """By key of the file."""
        for name, p in trainable_parameters(self.module).items():
            yield f"weight/{name}", p
            yield f"average/{name}", self.average[name]
            for kind, value in self.optimizer.state.get(p, {}).items():  # no state where there was no gradient yet
                yield f"{kind}/{name}", value

    def _files(self) -> Iterator[tuple[int, Path]]:
        """Step and path of each checkpoint."""
        for path in self.folder.glob("step-*.safetensors"):
            with suppress(ValueError):
                yield int(path.stem.removeprefix("step-")), path


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all, replacing an older one. Raises UserError."""
    with atomic_path(path, overwrite=True) as part:
        files.save_file(tensors, part)
