"""The kinds of heads: which tensors a head has, and how it writes the factors of one module.

All maps are linear, without bias or activation. A *direct* head maps embedding -> compress -> rank x d_in for down,
and embedding -> compress -> rank x d_out for up. A *core* head (arXiv 2606.13809) has a learned pair of factors, and
maps embedding -> compress -> rank x rank for the square matrix between them. Importing this does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class DecoderInput:
    """What the heads take of N pictures: embeddings [N, embed], the factors of their updates [N], and, where the model
    has one, their residual [N, length, dim], already scaled."""

    embeddings: torch.Tensor
    scales: torch.Tensor
    residual: torch.Tensor | None


@dataclass(frozen=True)
class HeadProjector:
    """The weights of a head, and what goes in. ``middle`` [N, compress] is added between the two matrices of a map."""

    weights: Mapping[str, torch.Tensor]
    inputs: DecoderInput
    middle: torch.Tensor | None

    def __call__(self, key: str, *, scaled: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
        """The map ``key`` of all embeddings: [N, its width], in ``out`` if given; ``scaled`` by the factors."""
        x = _linear(self.inputs.embeddings, self.weights[f"{key}.proj_in.weight"])
        if self.middle is not None:
            x = x + self.middle
        if scaled:
            x = x * self.inputs.scales[:, None]
        return _linear(x, self.weights[f"{key}.proj_out.weight"], out)


@dataclass(frozen=True)
class HeadKind:
    """A kind of head.

    ``marker``: a tensor that every head of the kind has. ``layout``(rank, d_out, d_in): the widths of its maps,
    {name: width}, and the shapes of its other tensors. ``write``(projector, key, rank, down, up): puts the factors of
    the head ``key`` into down [N x rank, d_in], which carries the scales, and up [d_out, N x rank].
    """

    marker: str
    layout: Callable[[int, int, int], tuple[dict[str, int], Shapes]]
    write: Callable[[HeadProjector, str, int, torch.Tensor, torch.Tensor], None]


def _direct(project: HeadProjector, key: str, rank: int, down: torch.Tensor, up: torch.Tensor) -> None:
    project(f"{key}.proj_a", scaled=True, out=down.view(-1, rank * down.shape[1]))
    _write_up(project(f"{key}.proj_b").view(-1, len(up), rank), up)


def _core(project: HeadProjector, key: str, rank: int, down: torch.Tensor, up: torch.Tensor) -> None:
    import torch

    core, down = project(f"{key}.core").view(-1, rank, rank), down.view(-1, rank, down.shape[1])
    torch.mul(project.weights[f"{key}.query_a"], project.inputs.scales[:, None, None], out=down)
    _write_up(project.weights[f"{key}.query_b"] @ core, up)


HEAD_KINDS = {
    "direct": HeadKind(
        "proj_a.proj_in.weight",
        lambda rank, d_out, d_in: ({"proj_a": rank * d_in, "proj_b": rank * d_out}, {}),
        _direct,
    ),
    "core": HeadKind(
        "query_a",
        lambda rank, d_out, d_in: ({"core": rank * rank}, {"query_a": (rank, d_in), "query_b": (d_out, rank)}),
        _core,
    ),
}


def _linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [N, inputs] to [N, outputs], in ``out`` if given."""
    import torch

    return torch.mm(x, weight.T, out=out)


def _write_up(factors: torch.Tensor, up: torch.Tensor) -> None:
    """Copy [N, d_out, rank] to ``up`` [d_out, N x rank]. The numbers of a row are copied as one wider number where
    torch has a type for it."""
    import torch

    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(factors.shape[2] * factors.itemsize)
    if wide is None or not factors.is_contiguous():
        up.view(len(up), len(factors), -1).copy_(factors.transpose(0, 1))
    else:  # written as up.T = factors: the other way round torch copies a transposed matrix, which is slower
        up.view(wide).T.copy_(factors.view(wide)[:, :, 0])
