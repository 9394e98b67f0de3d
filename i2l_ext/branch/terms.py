"""The low-rank term of one layer: the factors of all LoRAs that change it, concatenated along the rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from i2l_ext.converters import Lora, UserError

from .rows import RowWeights

if TYPE_CHECKING:
    from .match import LayerPart


@dataclass
class UpPart:
    """The up factors that make some rows of a layer's output: ``up`` [rows, k] of the ranks ``start`` to ``end``.
    ``rows`` None: all."""

    rows: tuple[int, int] | None
    start: int
    end: int
    up: torch.Tensor


class LayerTerm:
    """up @ (weights * (down @ x)) of one layer, added to its output in place.

    ``down`` [R, d_in] holds the factors of all LoRAs, those of the same output rows side by side; ``owners``: (number
    of the LoRA, rank) along R. The factors move to the output's device and dtype when they are first used, and stay.
    """

    def __init__(self, name: str, parts: Sequence[tuple[int, Lora, LayerPart]]) -> None:
        """``parts``: number of the LoRA, the LoRA, and what of it is in the layer. Reads the factors."""
        self.name, self.called = name, False
        self.owners: list[tuple[int, int]] = []
        self.ups: list[UpPart] = []
        downs, ranks = [], 0
        for rows in dict.fromkeys(part.rows for _, _, part in parts):
            pairs = [(number, *lora[part.path]) for number, lora, part in parts if part.rows == rows]
            dtype = _common_dtype([up for _, _, up in pairs])
            self.owners += [(number, len(down)) for number, down, _ in pairs]
            downs += [down for _, down, _ in pairs]
            end = ranks + sum(len(down) for _, down, _ in pairs)
            self.ups.append(UpPart(rows, ranks, end, _joined([up.to(dtype) for _, _, up in pairs], dim=1)))
            ranks = end
        dtype = _common_dtype(downs)
        self.down = _joined([down.to(dtype) for down in downs], dim=0)

    @property
    def nbytes(self) -> int:
        """Of the factors."""
        return self.down.nbytes + sum(part.up.nbytes for part in self.ups)

    def add(self, x: torch.Tensor, y: torch.Tensor, weights: RowWeights) -> None:
        """Add the term to ``y`` [B, ..., d_out], the layer's output for ``x`` [B, ..., d_in]. ``y`` is changed.

        Raises UserError where the layer has another shape than the LoRA, or rows that are not those of the batch.
        """
        self.called = True
        self._check(x, y)
        self._move(y)
        for run in weights.runs_of(len(x), self.name):
            hidden = x[run.start : run.end].to(y.device, y.dtype).flatten(0, -2) @ self.down.T
            scales = [run.weights[number] for number, _ in self.owners]
            if any(scale != scales[0] for scale in scales):
                spread = [scale for scale, (_, rank) in zip(scales, self.owners, strict=True) for _ in range(rank)]
                hidden *= torch.tensor(spread, dtype=torch.float32, device=y.device)
            alpha = scales[0] if len({*scales}) == 1 else 1.0
            out = y[run.start : run.end].view(-1, y.shape[-1])
            for part in self.ups:
                own = out if part.rows is None else out[:, slice(*part.rows)]
                own.addmm_(hidden[:, part.start : part.end], part.up.T, alpha=alpha)

    def _check(self, x: torch.Tensor, y: torch.Tensor) -> None:
        d_out = max(part.rows[1] if part.rows else len(part.up) for part in self.ups)
        if x.shape[-1] != self.down.shape[1] or y.shape[-1] < d_out:
            raise UserError(
                f"{self.name}: the layer maps {x.shape[-1]} to {y.shape[-1]}, the LoRA {self.down.shape[1]} to {d_out}."
            )

    def _move(self, y: torch.Tensor) -> None:
        if self.down.device != y.device or self.down.dtype != y.dtype:
            self.down = self.down.to(y.device, y.dtype)
            for part in self.ups:
                part.up = part.up.to(y.device, y.dtype)


def _common_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype of all of them, else float32."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _joined(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


def term_hook(term: LayerTerm, weights: RowWeights) -> Any:
    """A forward hook of a layer that adds the term to its output."""

    def add(layer: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        own = output if output.is_contiguous() and not output.requires_grad else output.clone()
        term.add(args[0], own, weights)
        return own

    return add
