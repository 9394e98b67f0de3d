"""A whole training run: its steps, their order, and which of them are done.

Each step writes one file, which appears whole or not at all. The same command continues a run that was stopped:
finished steps are skipped, and an unfinished one continues from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.nn.attention import SDPBackend, sdpa_kernel

from i2l_ext.converters.atomic import atomic_path
from i2l_ext.converters.errors import UserError

from .base import DTYPES, Foundation, TrainingBase
from .config import ExpertConfig, TrainingConfig
from .examples import Examples
from .experts import expert_task, load_expert, save_expert
from .loop import save_tensors, train_task
from .metrics import plot_losses


@dataclass(frozen=True)
class TrainingStep:
    """One file to be written, and the names of the steps whose files it needs."""

    name: str
    needs: tuple[str, ...]
    run: Callable[[Accelerator], None]


class TrainingPlan:
    """The steps of a configuration, in an order in which they can be done: foundations, examples, experts."""

    def __init__(self, config: TrainingConfig, base: TrainingBase, report: Callable[[str], None]) -> None:
        """``report`` gets lines of text about the progress."""
        self.config, self.base, self.report, self.folder = config, base, report, Path(config.output)
        sources = tuple(name for name, foundation in base.foundations.items() if foundation.examples_need_it)
        steps = [
            *(
                TrainingStep(name, part.needs, partial(self._foundation, name, part))
                for name, part in base.foundations.items()
            ),
            TrainingStep("examples", sources, self._examples),
            *(TrainingStep(e.name, ("examples", *e.upon), partial(self._expert, e)) for e in config.experts),
        ]
        self.steps = {step.name: step for step in steps}

    def file(self, name: str) -> Path:
        """What the step writes."""
        return self.folder / f"{name}.safetensors"

    def done(self, name: str) -> bool:
        """Whether the step's file is there."""
        return self.file(name).exists()

    def run(self, only: str | None = None) -> None:
        """Do all steps that are not done, or the one named, in this process. Raises UserError."""
        accelerator = Accelerator(
            mixed_precision=self.config.precision,
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if accelerator.is_main_process:
            self._claim_folder()
        accelerator.wait_for_everyone()
        with self._attention():
            for step in self.steps.values() if only is None else [self.steps[only]]:
                if not self.done(step.name):
                    step.run(accelerator)
                    accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._plot()

    def run_parallel(self, command: list[str]) -> None:
        """Do all steps that are not done, up to ``config.lanes`` at a time, each as ``command`` + ["--only", name].

        Raises UserError when one of them fails; the others are stopped then.
        """
        self._claim_folder()
        waiting = [step for step in self.steps.values() if not self.done(step.name)]
        running: dict[str, subprocess.Popen[bytes]] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.config.threads)}
        try:
            while waiting or running:
                ready = [step for step in waiting if all(self.done(need) for need in step.needs)]
                for step in ready[: self.config.lanes - len(running)]:
                    waiting.remove(step)
                    line = [*command, "--only", step.name]
                    # In a session of its own. So Ctrl-C reaches this process only, which stops the others; and
                    # schedulers that divide time by session (Linux's autogroup) count each process.
                    running[step.name] = subprocess.Popen(line, env=environment, start_new_session=True)
                time.sleep(0.2)
                ended = {name: process for name, process in running.items() if process.poll() is not None}
                for name, process in ended.items():
                    del running[name]
                    if process.returncode:
                        raise UserError(f"{name}: the training step ended with exit code {process.returncode}.")
        finally:
            for process in running.values():
                process.terminate()
        self._plot()

    def _attention(self) -> AbstractContextManager[None]:
        """PyTorch's plain attention on a CPU, where the base is faster with it."""
        plain = self.base.plain_attention and not torch.cuda.is_available()
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    def _claim_folder(self) -> None:
        """Make the folder and write the configuration into it. Raises UserError where another one is there: files
        of two configurations do not fit together."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = dataclasses.asdict(self.config)
        for free in ("output", "lanes", "threads"):  # results do not depend on these
            settings.pop(free)
        text = json.dumps(settings, indent=1)
        path = self.folder / "config.json"
        if path.exists() and path.read_text() != text:
            raise UserError(f"{self.folder} belongs to another configuration: name another output, or delete it.")
        if not path.exists():
            with atomic_path(path) as part:
                part.write_text(text)

    def _plot(self) -> None:
        plot_losses(self.folder / "metrics.jsonl", self.folder / "loss.png")

    def _foundation(self, name: str, foundation: Foundation, accelerator: Accelerator) -> None:
        task = foundation.build(self.folder)
        train_task(task, self.folder / f"{name}.steps", accelerator, self.report)
        if accelerator.is_main_process:
            weights = foundation.weights(task.module)
            save_tensors(self.file(name), {key: value.detach().half() for key, value in weights.items()})

    def _examples(self, accelerator: Accelerator) -> None:
        if accelerator.is_main_process:
            views = {expert.view for expert in self.config.experts if expert.view}
            patches = any(expert.kind == "queries" for expert in self.config.experts)
            self.base.examples(self.folder, views, patches).save(self.file("examples"))

    def _expert(self, expert: ExpertConfig, accelerator: Accelerator) -> None:
        base, examples = self.base.load(self.folder, accelerator.device), Examples.load(self.file("examples"))
        by_name = {other.name: other for other in self.config.experts}
        frozen = [(by_name[n], load_expert(by_name[n], base.arch, examples, self.file(n))) for n in expert.upon]
        for _, heads in frozen:
            heads.to(accelerator.device)
        task = expert_task(
            expert, base, examples, frozen,
            seed=self.config.seed, device=accelerator.device, dtype=DTYPES[self.config.precision],
        )  # fmt: skip
        train_task(task, self.folder / f"{expert.name}.steps", accelerator, self.report)
        if accelerator.is_main_process:
            save_expert(task.module, base.arch, self.file(expert.name))


def train_command(config: Path) -> list[str]:
    """The command line that starts this program again with a configuration."""
    return [sys.executable, "-m", "i2l_ext", "train", str(config)]
