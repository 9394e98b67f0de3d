"""Networks that are not plain LoRA: LoKr, LoHa, DoRA and full differences, and how each becomes down and up factors.

LoKr is a Kronecker product of two small matrices, LoHa a Hadamard product of two low-rank ones. Both have factors of
the product of the two ranks, made from the factors of the two halves: kron(A B, C D) = kron(A, C) kron(B, D), and the
rows of the factors of (A B) * (C D) are the products of theirs (Khatri-Rao). The singular values of a Kronecker product
are the products of the halves' (Van Loan, The ubiquitous Kronecker product, 2000), so its nearest LoRA needs no large
matrix. DoRA changes the length of the rows (or columns) of the base model's weight: its difference has full rank.

Names, shapes and scales are those of LyCORIS and PEFT. The functions up to `scale` need neither torch nor the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .lora import Pair
    from .rank import SVD

Shape = tuple[int, ...]

HALVES = {"LoKr": ("lokr_w1", "lokr_w2"), "LoHa": ("hada_w1", "hada_w2")}
"""Kind -> its two halves. A half is one matrix of this name, or NAME_a [rows, r] and NAME_b [r, columns]."""
TUCKER = {"lokr_w1": "lokr_t1", "lokr_w2": "lokr_t2", "hada_w1": "hada_t1", "hada_w2": "hada_t2"}
"""Half -> its third factor, [r, r]: then the half is NAME_a^T @ t @ NAME_b. Written for convolutions only."""

KIND_OF_PART = {
    "down": "LoRA",
    "up": "LoRA",
    "diff": "full difference",
    **{
        part: kind
        for kind, halves in HALVES.items()
        for half in halves
        for part in (half, f"{half}_a", f"{half}_b", TUCKER[half])
    },
}
"""Part of a module's tensors -> the kind of network that has it."""

SUFFIXES = {
    **{f".{part}": part for part, kind in KIND_OF_PART.items() if kind != "LoRA"},
    ".diff_b": "bias",
    ".dora_scale": "magnitude",
    ".magnitude": "magnitude",
    ".lora_magnitude_vector": "magnitude",
}
"""What may follow a module's name in a key -> the part, beside those of a plain LoRA (`key_formats.SUFFIXES`)."""


@dataclass(frozen=True)
class Network:
    """The keys of a module's tensors by part, where it is not a plain LoRA. ``rows``: (start, end) of the module's
    rows, where the file has a fused layer. ``name``: the layer's, as the file spells it."""

    kind: str
    keys: Mapping[str, str]
    rows: tuple[int, int] | None = None
    name: str = ""

    @property
    def needs_base(self) -> bool:
        """Whether its difference depends on the base model's weight."""
        return "magnitude" in self.keys

    @property
    def title(self) -> str:
        """For the user: ``LoKr``, ``DoRA``, ``LoKr with DoRA``."""
        return {"LoRA": "DoRA"}.get(self.kind, f"{self.kind} with DoRA") if self.needs_base else self.kind

    def shapes(self, of_keys: Mapping[str, Shape]) -> dict[str, Shape]:
        """{part: shape} from {key: shape}."""
        return {part: tuple(of_keys[key]) for part, key in self.keys.items()}


def kinds_of(parts: Iterable[str]) -> list[str]:
    """The kinds of network that a module's parts belong to; more than one is an error of the file."""
    return list(dict.fromkeys(KIND_OF_PART[part] for part in parts if part in KIND_OF_PART))


def is_complete(kind: str, parts: Iterable[str]) -> bool:
    """Whether a module's parts are all that a network of ``kind`` needs."""
    have = set(parts)
    if kind in HALVES:
        return all(half in have or {f"{half}_a", f"{half}_b"} <= have for half in HALVES[kind])
    return {"LoRA": {"down", "up"}, "full difference": {"diff"}}[kind] <= have


def _matrix(part: str, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """Its rows and columns. Raises ValueError for a convolution's; a kernel of one point is a matrix."""
    shape = shapes[part]
    if len(shape) < 2 or any(size != 1 for size in shape[2:]) or 0 in shape:
        raise ValueError(f"its {part} is {list(shape)}, not a matrix")
    return shape[0], shape[1]


def _half_shape(half: str, shapes: Mapping[str, Shape]) -> tuple[int, int, int]:
    """Rows, columns and rank of one half. Raises ValueError where its factors do not fit."""
    if half in shapes:
        rows, columns = _matrix(half, shapes)
        return rows, columns, min(rows, columns)
    a, (rank_b, columns) = _matrix(f"{half}_a", shapes), _matrix(f"{half}_b", shapes)
    tucker = TUCKER[half] in shapes
    rank_a, rows = a if tucker else (a[1], a[0])
    if (_matrix(TUCKER[half], shapes) if tucker else (rank_b, rank_b)) != (rank_a, rank_b):
        raise ValueError(f"its factors {half}_a and {half}_b have ranks {rank_a} and {rank_b}")
    return rows, columns, min(rank_a, rank_b)


def size(kind: str, shapes: Mapping[str, Shape]) -> tuple[int, int, int]:
    """(d_out, d_in, rank) of the difference that parts of these shapes make; rank: of its exact factors.

    Raises ValueError with the reason where the parts do not fit each other.
    """
    if kind == "LoRA":
        (rank, d_in), (d_out, _) = _matrix("down", shapes), _matrix("up", shapes)
        return d_out, d_in, rank
    if kind == "full difference":
        d_out, d_in = _matrix("diff", shapes)
        return d_out, d_in, min(d_out, d_in)
    (rows, columns, rank), (rows_2, columns_2, rank_2) = (_half_shape(half, shapes) for half in HALVES[kind])
    if kind == "LoKr":
        return rows * rows_2, columns * columns_2, rank * rank_2
    if (rows, columns) != (rows_2, columns_2):
        raise ValueError(f"its halves are [{rows}, {columns}] and [{rows_2}, {columns_2}]")
    return rows, columns, rank * rank_2


def misfit(network: Network, shapes: Mapping[str, Shape], d_out: int, d_in: int) -> str | None:
    """Why a network does not fit a layer [d_out, d_in], or None. ``shapes``: by key."""
    parts = network.shapes(shapes)
    try:
        rows, columns, _ = size(network.kind, parts)
    except ValueError as error:
        return str(error)
    if (rows, columns) != (d_out, d_in):
        return f"it maps {columns} to {rows}, not {d_in} to {d_out}"
    if math.prod(parts.get("alpha", ())) != 1:
        return "its alpha is not a number"
    if network.needs_base and parts["magnitude"] not in ((d_out,), (d_out, 1), (1, d_in)):
        return f"its magnitude is {list(parts['magnitude'])}, neither [{d_out}, 1] nor [1, {d_in}]"
    if network.needs_base and network.rows and parts["magnitude"] == (1, d_in):
        return "its magnitude is that of the columns of a fused layer, which cannot be split"
    return None


def scale(kind: str, shapes: Mapping[str, Shape], alpha: float | None) -> float:
    """The factor of the difference: alpha / rank, where the rank is that of the first half that has factors.

    1 without an alpha, for a LoKr of two whole matrices and for a full difference, whatever their alpha is.
    """
    rank = rank_of_factors(kind, shapes)
    return alpha / rank if rank and alpha is not None else 1.0


def rank_of_factors(kind: str, shapes: Mapping[str, Shape]) -> int | None:
    """The rank of the first half that has factors; None where there is none, as in a LoKr of two whole matrices."""
    return next((_half_shape(half, shapes)[2] for half in HALVES.get(kind, ()) if half not in shapes), None)


def _half(half: str, parts: Mapping[str, torch.Tensor]) -> Pair:
    """Factors of one half, exact: down [r, columns], up [rows, r]."""
    import torch

    if half in parts:
        matrix = parts[half].flatten(1)
        rows, columns = matrix.shape
        unit = torch.eye(min(rows, columns), dtype=matrix.dtype)
        return (matrix, unit) if rows <= columns else (unit, matrix)
    a, b = parts[f"{half}_a"].flatten(1), parts[f"{half}_b"].flatten(1)
    if TUCKER[half] in parts:
        a = a.mT @ parts[TUCKER[half]].flatten(1)
    return b, a


def factors(kind: str, parts: Mapping[str, torch.Tensor]) -> Pair:
    """Exact factors of the difference without its scale: down [rank, d_in], up [d_out, rank], rank as `size` says.

    ``parts``: all of one dtype. The factors of a full difference are itself and a unit matrix.
    """
    import torch

    if kind == "LoRA":
        return parts["down"], parts["up"]
    if kind == "full difference":
        return _half("diff", parts)
    (down, up), (down_2, up_2) = (_half(half, parts) for half in HALVES[kind])
    if kind == "LoKr":
        return torch.kron(down, down_2), torch.kron(up, up_2)
    return (down[:, None] * down_2[None]).flatten(0, 1), (up[:, :, None] * up_2[:, None, :]).flatten(1)


def difference(kind: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The difference as a matrix [d_out, d_in], without its scale."""
    import torch

    if kind not in HALVES:
        down, up = factors(kind, parts)
        return parts["diff"].flatten(1) if kind == "full difference" else up @ down
    first, second = (up @ down for down, up in (_half(half, parts) for half in HALVES[kind]))
    return torch.kron(first, second) if kind == "LoKr" else first * second


def decomposed_difference(weight: torch.Tensor, update: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """DoRA's difference to ``weight`` [d_out, d_in]: magnitude * (weight + update) / |weight + update| - weight.

    The norm is that of rows where ``magnitude`` is [d_out] or [d_out, 1], of columns where it is [1, d_in].
    """
    import torch

    changed = weight + update
    columns = magnitude.dim() == 2 and magnitude.shape[0] == 1 != changed.shape[0]
    norm = torch.linalg.vector_norm(changed, dim=0 if columns else 1, keepdim=True, dtype=torch.float64)
    ratio = magnitude.double().reshape(norm.shape) / norm.clamp(min=torch.finfo(torch.float32).tiny)
    # not ratio * changed - weight: the two are nearly equal, and their difference would lose digits
    return update * ratio.to(update.dtype) + weight * (ratio - 1).to(weight.dtype)


def svd_of_kronecker(parts: Mapping[str, torch.Tensor], rank: int | None = None, *, exact: bool = False) -> SVD:
    """The decomposition of a LoKr's difference without its scale; ``rank``: how many columns of u and rows of vh.

    All singular values are there, also beyond ``rank``.
    """
    import torch

    from .rank import SVD, svd_of_product

    first, second = (
        svd_of_matrix(parts[half].flatten(1)) if half in parts else svd_of_product(*_half(half, parts), exact=exact)
        for half in HALVES["LoKr"]
    )
    values, order = torch.outer(first.s, second.s).flatten().sort(descending=True, stable=True)
    i, j = (index[:rank] for index in (order // len(second.s), order % len(second.s)))
    u = (first.u[:, None, i] * second.u[None, :, j]).flatten(0, 1)
    vh = (first.vh[i, :, None] * second.vh[j, None, :]).flatten(1)
    return SVD(u, values, vh)


OVERSAMPLED, KRYLOV_STEPS = 8, 8


def svd_of_matrix(matrix: torch.Tensor, rank: int | None = None) -> SVD:
    """The decomposition of a large matrix, or its first ``rank`` values and vectors by block Krylov iteration
    (Musco and Musco 2015), which takes seconds less and whose error is above the best possible one by under 1e-4 of it.

    Then ``s`` has one number more: the norm of all that is left.
    """
    import torch

    from .rank import SVD

    width = KRYLOV_STEPS * ((rank or 0) + OVERSAMPLED)
    if rank is None or 2 * width > min(matrix.shape):
        return SVD(*torch.linalg.svd(matrix, full_matrices=False))
    generator = torch.Generator().manual_seed(0)
    block = matrix @ torch.randn(matrix.shape[1], rank + OVERSAMPLED, generator=generator).to(matrix)
    basis = block[:, :0]
    for _ in range(KRYLOV_STEPS):
        for _ in range(2):  # once leaves rounding errors, which the next step would enlarge
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
        basis = torch.cat([basis, block], dim=1)
        block = matrix @ (matrix.mT @ block)
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    rest = matrix.double().square().sum() - s[:rank].double().square().sum()
    return SVD(basis @ u[:, :rank], torch.cat([s[:rank], rest.clamp(min=0).sqrt()[None].to(s)]), vh[:rank])
