"""Two diagrams of a LoRA: how large its update is where, and how much of it each rank keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import atomic_path
from .lora import Lora

if TYPE_CHECKING:
    import torch


def plot_lora(lora: Lora, values: Mapping[str, torch.Tensor], path: Path, *, overwrite: bool = False) -> None:
    """Write a PNG to ``path``: a heat map of the update's root mean square, block by kind, and the effect kept at each
    rank, by kind. ``values``: singular values by module path, descending.

    Raises UserError where ``path`` exists or cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modules = {module_path: lora.arch.modules[module_path] for module_path in values}
    rows = list(dict.fromkeys((module.stack, module.block) for module in modules.values()))
    kinds = list(dict.fromkeys(module.kind.name for module in modules.values()))
    sizes = [[math.nan] * len(kinds) for _ in rows]
    for module_path, module in modules.items():
        norm = float(values[module_path].square().sum().sqrt())
        sizes[rows.index((module.stack, module.block))][kinds.index(module.kind.name)] = norm / math.sqrt(
            math.prod(module.shape)
        )

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    heat, curve = figure.subplots(1, 2)
    image = heat.imshow(sizes, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=heat, label="root mean square of the update")
    heat.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right")
    shown = range(0, len(rows), max(1, len(rows) // 30))
    heat.set_yticks(shown, [_row(*rows[index]) for index in shown])
    heat.set_title(f"{lora.arch.title}: size of the update")

    for kind in kinds:
        _curve(curve, [values[p] for p, module in modules.items() if module.kind.name == kind], kind, width=1)
    _curve(curve, list(values.values()), "all", width=3, color="black")
    curve.set_xlabel("rank kept")
    curve.set_ylabel("effect kept: share of the sum of s²")
    curve.axhline(0.99, color="grey", linestyle=":", linewidth=1)
    curve.set_title("singular values: which rank is enough")
    curve.legend(fontsize="small")
    with atomic_path(path, overwrite=overwrite) as part:
        figure.savefig(part, format="png", dpi=110)


def _row(stack: str | None, block: int | None) -> str:
    return "single" if stack is None else f"{stack.removesuffix('_blocks')}.{block}"


def _curve(axes: Any, values: list[torch.Tensor], label: str, *, width: float, color: str | None = None) -> None:
    longest = max(len(module_values) for module_values in values)
    summed = values[0].new_zeros(longest)
    for module_values in values:
        summed[: len(module_values)] += module_values.square()
    total = float(summed.sum()) or 1.0
    shares = [0.0, *(summed.cumsum(0) / total).tolist()]
    axes.plot(range(longest + 1), shares, label=label, linewidth=width, color=color)
