"""The log of a training run, and its picture."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import torch

from i2l_ext.converters.atomic import atomic_path


class MetricsLog:
    """A JSON line every so many steps: task, step, mean loss, mean gradient norm, learning rate, seconds."""

    def __init__(self, path: Path, task: str, step: int, writes: bool) -> None:
        """``step``: where the task goes on. ``writes``: whether this process writes the file."""
        self.path, self.task, self.writes = path, task, writes
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.since = time.monotonic()
        if writes and path.exists():
            # The steps after the checkpoint are done, and logged, again.
            kept = [line for line in read_metrics(path) if line["task"] != task or line["step"] <= step]
            with atomic_path(path, overwrite=True) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def add(self, loss: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Note one step."""
        self.losses.append(loss)
        if norm is not None:
            self.norms.append(torch.as_tensor(norm))

    def write(self, step: int, learning_rate: float) -> str:
        """Log the steps noted since the last line; the line as people read it."""
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
    """The lines of a log. A last line that was cut short is left out."""
    lines = []
    for text in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def plot_losses(metrics: Path, path: Path) -> None:
    """Draw the log into a PNG: a panel for each task, loss over steps. Nothing where there is no log."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics) if metrics.exists() else []
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    if not tasks:
        return
    columns, rows = min(4, len(tasks)), -(-len(tasks) // 4)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(rows, columns, panel)
        own = [line for line in lines if line["task"] == task]
        axes.plot([line["step"] for line in own], [line["loss"] for line in own], linewidth=1)
        axes.set(title=task, xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3)
    with atomic_path(path, overwrite=True) as part:
        figure.savefig(part, format="png", dpi=100)
