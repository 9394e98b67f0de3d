"""The loss curves of a run, drawn."""

from __future__ import annotations

from pathlib import Path

from i2l_ext.converters.atomic import atomic_path

from .loop import read_metrics


def plot(metrics: Path, path: Path) -> None:
    """One panel a task: the mean loss of every logged stretch, over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics) if metrics.exists() else []
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    if not tasks:
        return
    figure = Figure(figsize=(4 * min(4, len(tasks)), 3 * -(-len(tasks) // 4)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(-(-len(tasks) // 4), min(4, len(tasks)), place)
        own = [line for line in lines if line["task"] == task]
        axes.plot([line["step"] for line in own], [line["loss"] for line in own], linewidth=1)
        axes.set(title=task, xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3)
    with atomic_path(path, overwrite=True) as part:
        figure.savefig(part, format="png", dpi=100)
