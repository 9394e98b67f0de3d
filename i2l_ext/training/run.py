"""A whole run: what is to be done, in which order, and what of it is done already.

Every step leaves one file, which appears whole or not at all. A run that was killed is started again with the same
command: finished steps are skipped, and the one that was broken off goes on from its last checkpoint.
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
from i2l_ext.converters.files import save_file

from . import experts
from .config import Config, Expert
from .curve import plot
from .examples import Examples
from .loop import train

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Step:
    """One file to be made, and the steps whose files it needs."""

    name: str
    needs: tuple[str, ...]
    work: Callable[[Accelerator], None]


class Plan:
    """The steps of a configuration, in an order in which they can be done."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.config, self.say, self.folder = config, say, Path(config.output)
        steps: list[Step] = []
        sources: tuple[str, ...] = ()
        if config.foundations:
            from i2l_ext.mini import foundations

            tasks = foundations.tasks(config.foundations, config.seed)
            steps += [Step(name, (), partial(self._foundation, name)) for name in tasks]
            sources = tuple(tasks)
        steps.append(Step("examples", tuple(name for name in sources if name != "judge"), self._examples))
        steps += [
            Step(expert.name, ("examples", *expert.upon), partial(self._expert, expert)) for expert in config.experts
        ]
        self.steps = {step.name: step for step in steps}

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def done(self, name: str) -> bool:
        return self.file(name).exists()

    def run(self, only: str | None = None) -> None:
        """All steps that are not done, in this process; or the one that is named."""
        accelerator = Accelerator(
            mixed_precision=self.config.precision,
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_same()
        accelerator.wait_for_everyone()
        with self._attention():
            for step in self.steps.values() if only is None else [self.steps[only]]:
                if not self.done(step.name):
                    step.work(accelerator)
                    accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            plot(self.folder / "metrics.jsonl", self.folder / "loss.png")

    def run_lanes(self, command: list[str]) -> None:
        """Steps that do not wait for each other side by side, each as ``command`` + ["--only", name].

        Raises UserError when one of them fails; the others are stopped then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_same()
        waiting = [step for step in self.steps.values() if not self.done(step.name)]
        running: dict[str, subprocess.Popen[bytes]] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.config.threads)}
        try:
            while waiting or running:
                ready = [s for s in waiting if all(self.done(need) for need in s.needs)]
                for step in ready[: self.config.lanes - len(running)]:
                    waiting.remove(step)
                    line = [*command, "--only", step.name]
                    # A session of its own: Ctrl-C is answered here, once, and schedulers that share out time by
                    # session (Linux's autogroup) see two lanes and not one.
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
        plot(self.folder / "metrics.jsonl", self.folder / "loss.png")

    def _attention(self) -> AbstractContextManager[None]:
        """On a CPU the plain attention: for the miniature's short sequences the backward pass of PyTorch's fused one
        takes six times as long."""
        plain = self.config.base.kind == "mini" and not torch.cuda.is_available()
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    def _check_same(self) -> None:
        """A folder belongs to one configuration: its files would not fit another."""
        own = dataclasses.asdict(self.config)
        for free in ("output", "lanes", "threads"):
            own.pop(free)
        text = json.dumps(own, indent=1)
        path = self.folder / "config.json"
        if path.exists() and path.read_text() != text:
            raise UserError(f"{self.folder} belongs to another configuration: name another output, or delete it.")
        if not path.exists():
            with atomic_path(path) as part:
                part.write_text(text)

    def _foundation(self, name: str, accelerator: Accelerator) -> None:
        from i2l_ext.mini import foundations

        if self.config.foundations is None:
            raise UserError("foundations: this section is missing.")
        task = foundations.tasks(self.config.foundations, self.config.seed)[name]()
        train(task, self.folder / f"{name}.steps", accelerator, self.say)
        if accelerator.is_main_process:
            with atomic_path(self.file(name), overwrite=True) as part:
                kept = foundations.weights(name, task.module)
                save_file({key: value.detach().half() for key, value in kept.items()}, part)

    def _base(self, accelerator: Accelerator) -> experts.Backbone:
        if self.config.base.kind == "mini":
            from i2l_ext.mini.base import Base

            return Base.load(self.file("base"))
        from .qwen_image import QwenImage

        dtype = DTYPES[self.config.precision]
        base = QwenImage(Path(self.config.base.path), dtype, self.config.gradient_checkpointing)
        return base.to(accelerator.device)

    def _examples(self, accelerator: Accelerator) -> None:
        if not accelerator.is_main_process:
            return
        views = {expert.view for expert in self.config.experts if expert.view}
        if self.config.data.kind == "world":
            from i2l_ext.mini import dataset

            made = dataset.make(self.config.data, self.folder, views, self.config.seed)
        else:
            from . import qwen_image

            made = qwen_image.examples(self.config, views)
        made.save(self.file("examples"))

    def _expert(self, expert: Expert, accelerator: Accelerator) -> None:
        base, examples = self._base(accelerator), Examples.load(self.file("examples"))
        by_name = {other.name: other for other in self.config.experts}
        under = [(by_name[n], experts.load(by_name[n], base.arch, examples, self.file(n))) for n in expert.upon]
        for _, heads in under:
            heads.to(accelerator.device)
        task = experts.task(
            expert, base, examples, under,
            seed=self.config.seed, device=accelerator.device, dtype=DTYPES[self.config.precision],
        )  # fmt: skip
        train(task, self.folder / f"{expert.name}.steps", accelerator, self.say)
        if accelerator.is_main_process:
            experts.save(task.module, base.arch, self.file(expert.name))


def command_of(config: Path) -> list[str]:
    """This program, started once more for one step."""
    return [sys.executable, "-m", "i2l_ext", "train", str(config)]
