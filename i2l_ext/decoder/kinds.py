"""The kinds of heads: which tensors a head has, and how it writes the factors of one module.

All maps are linear, without activation. A *direct* head maps embedding -> compress -> rank x d_in for down, and
embedding -> compress -> rank x d_out for up. A *core* head (arXiv 2606.13809) has a learned pair of factors, and maps
embedding -> compress -> rank x rank for the square matrix between them. A *compressed* head (DiffSynth-Studio's
ZImageImage2LoRAModelCompressed) is the same with one matrix and a bias for the map. A *queries* head belongs to the
predictor of arXiv 2606.13809: ``transformer`` turns its learned queries and the tokens of all pictures into vectors,
and the head maps each of them, vector -> compress -> d_in or d_out, to one row of down or one column of up. Importing
this does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class DecoderInput:
    """What the heads take of N pictures: embeddings [N, embed], the factors of their updates [N], and, where the model
    has one, their residual [N, length, dim], already scaled.

    Where a transformer sees all pictures together, N is 1 and ``written`` has its vectors in place of the embeddings:
    by a head's key [2 x rank, width], first those for down.
    """

    embeddings: torch.Tensor
    scales: torch.Tensor
    residual: torch.Tensor | None
    written: Mapping[str, torch.Tensor] = field(default_factory=dict)


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

    ``marker``: a tensor that every head of the kind has. ``layout``(rank, d_out, d_in, embed): the widths of its maps,
    {name: width}, and the shapes of its other tensors. ``write``(projector, key, rank, down, up): puts the factors of
    the head ``key`` into down [N x rank, d_in], which carries the scales, and up [d_out, N x rank].
    ``measure``(shapes of a head, d_in): (embed, compress, rank). ``by_path``: heads are named after their module's
    path, not by block and layer; then they have no residual. ``queries``: the tensors, [rank, embed] each, that go
    through a transformer with the pictures before the heads are used; only a kind with a transformer has them.
    """

    marker: str
    layout: Callable[[int, int, int, int], tuple[dict[str, int], Shapes]]
    write: Callable[[HeadProjector, str, int, torch.Tensor, torch.Tensor], None]
    measure: Callable[[Shapes, int], tuple[int, ...]]
    by_path: bool = False
    queries: tuple[str, ...] = ()


def _direct(project: HeadProjector, key: str, rank: int, down: torch.Tensor, up: torch.Tensor) -> None:
    project(f"{key}.proj_a", scaled=True, out=down.view(-1, rank * down.shape[1]))
    _write_up(project(f"{key}.proj_b").view(-1, len(up), rank), up)


def _core(project: HeadProjector, key: str, rank: int, down: torch.Tensor, up: torch.Tensor) -> None:
    import torch

    core, down = project(f"{key}.core").view(-1, rank, rank), down.view(-1, rank, down.shape[1])
    torch.mul(project.weights[f"{key}.query_a"], project.inputs.scales[:, None, None], out=down)
    _write_up(project.weights[f"{key}.query_b"] @ core, up)


def _compressed(project: HeadProjector, key: str, rank: int, down: torch.Tensor, up: torch.Tensor) -> None:
    import torch

    inputs, weights = project.inputs, project.weights
    core = torch.nn.functional.linear(inputs.embeddings, weights[f"{key}.proj.weight"], weights[f"{key}.proj.bias"])
    core = core.view(-1, rank, rank) * inputs.scales[:, None, None]
    torch.matmul(core, weights[f"{key}.lora_a"], out=down.view(-1, rank, down.shape[1]))
    up.view(len(up), -1, rank).copy_(weights[f"{key}.lora_b"][:, None])


def _queries(project: HeadProjector, key: str, rank: int, down: torch.Tensor, up: torch.Tensor) -> None:
    import torch

    weights, (rows, columns) = project.weights, project.inputs.written[key].split(rank)
    rows = _linear(rows, weights[f"{key}.proj_a.proj_in.weight"]) * project.inputs.scales
    _linear(rows, weights[f"{key}.proj_a.proj_out.weight"], down)
    columns = _linear(columns, weights[f"{key}.proj_b.proj_in.weight"])
    torch.mm(weights[f"{key}.proj_b.proj_out.weight"], columns.T, out=up)


HEAD_KINDS = {
    "direct": HeadKind(
        "proj_a.proj_in.weight",
        lambda rank, d_out, d_in, embed: ({"proj_a": rank * d_in, "proj_b": rank * d_out}, {}),
        _direct,
        lambda shapes, d_in: (*shapes["proj_a.proj_in.weight"][::-1], shapes["proj_a.proj_out.weight"][0] // d_in),
    ),
    "core": HeadKind(
        "query_a",
        lambda rank, d_out, d_in, embed: ({"core": rank * rank}, {"query_a": (rank, d_in), "query_b": (d_out, rank)}),
        _core,
        lambda shapes, d_in: (*shapes["core.proj_in.weight"][::-1], shapes["query_a"][0]),
    ),
    "compressed": HeadKind(
        "lora_a",
        lambda rank, d_out, d_in, embed: (
            {},
            {
                "lora_a": (rank, d_in),
                "lora_b": (d_out, rank),
                "proj.weight": (rank * rank, embed),
                "proj.bias": (rank * rank,),
            },
        ),
        _compressed,
        lambda shapes, d_in: (shapes["proj.weight"][1], 0, shapes["lora_a"][0]),
        by_path=True,
    ),
    "queries": HeadKind(
        "proj_a.proj_in.weight",
        lambda rank, d_out, d_in, embed: ({"proj_a": d_in, "proj_b": d_out}, {}),
        _queries,
        lambda shapes, d_in: (*shapes["proj_a.proj_in.weight"][::-1], shapes["query_a"][0]),
        by_path=True,
        queries=("query_a", "query_b"),
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
