"""The rank of a LoRA: its singular values, the nearest LoRA of a lower rank, and a higher rank that can learn.

An update up @ down has at most rank r, so its singular values are those of a core of r x r: QR of down^T and of up,
then the SVD of R_up @ R_down^T (Golub and Van Loan, Matrix Computations, 4th ed., 5.2 and 8.6). By the theorem of
Eckart and Young the first k of them give the nearest update of rank k, in the Frobenius and the spectral norm. The
dense update of hundreds of millions of numbers is never formed.

"Effect kept" is the share of sum(s^2), the squared Frobenius norm of the update, that is left after resizing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .errors import UserError
from .lora import FactorSpec, Lora
from .threads import one_thread, usual_threads

if TYPE_CHECKING:
    import torch

    from .architectures import Architecture
    from .lora import Pair

ROW_NORM = 1 / math.sqrt(3)
"""Norm of a down row: the average that Kaiming's U(-1/sqrt(d_in), 1/sqrt(d_in)) gives in a fresh LoRA."""

SMALL_RANK = 128
"""Up to this rank a module's factorization is done on one thread."""

RANK_LIMIT = 4096
"""More than any LoRA has; the matrices of the models are 3072 wide and wider."""


@dataclass(frozen=True)
class SVD:
    """up @ down = u @ diag(s) @ vh, with orthonormal columns of u [d_out, k] and rows of vh [k, d_in]; s [k] descends,
    k = min(d_out, rank, d_in). Where only the first vectors were asked for, s goes on with the values without vectors,
    or with the norm of all that is left."""

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor


def svd_of_product(down: torch.Tensor, up: torch.Tensor, *, exact: bool = False) -> SVD:
    """The singular value decomposition of up [d_out, r] @ down [r, d_in], in float32, or float64 where ``exact``."""
    import torch

    dtype = torch.float64 if exact else torch.float32
    with one_thread() if len(down) <= SMALL_RANK else usual_threads():
        q_down, r_down = torch.linalg.qr(down.to(dtype).mT)
        q_up, r_up = torch.linalg.qr(up.to(dtype))
        u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
        return SVD(q_up @ u, s, vh @ q_down.mT)


def singular_values(
    lora: Lora, *, exact: bool = False, progress: Callable[[float], None] = lambda share: None
) -> dict[str, torch.Tensor]:
    """Those of every module's update by path, descending, float64 [min(d_out, rank, d_in)].

    ``exact`` computes in float64, else float32. ``progress`` is told after each module what share is done, 0 to 1.
    Raises UserError where a factor holds NaN or infinity.
    """
    values = {}
    with one_thread():
        for number, path in enumerate(lora, 1):
            values[path] = _module_svd(lora, path, exact).s.double()
            progress(number / len(lora))
    return values


def _module_svd(lora: Lora, path: str, exact: bool, rank: int | None = None) -> SVD:
    """Of a module's update; at least the first ``rank`` vectors, all unless given."""
    if lora.source and (svd := lora.source.svd(path, rank, exact=exact)):
        return svd
    down, up = lora[path]
    if not (down.isfinite().all() and up.isfinite().all()):
        raise UserError(f"{path}: the factors hold NaN or infinity.")
    return svd_of_product(down, up, exact=exact)


def factors_of_rank(
    svd: SVD,
    rank: int,
    fresh_rows: Callable[[int, int], torch.Tensor],
    row_norm: float = ROW_NORM,
    *,
    equal: bool = False,
) -> Pair:
    """Factors of exactly ``rank``, float32: down [rank, d_in], up [d_out, rank].

    The rows of down have the norm ``row_norm``. Or, where ``equal``, each is as long as its column of up, but not
    shorter than `ROW_NORM`: of all ways to write an update, a step of Adam changes this one least.

    They hold the largest singular values. Where ``rank`` is higher than their number, the further rows of down come
    from ``fresh_rows(count, d_in)`` and the further columns of up are zero: the update is unchanged, and the columns
    have a gradient from the first step on. If both were zero, they would stay zero for ever.
    """
    import torch

    count = min(rank, len(svd.s))
    norms = svd.s[:count].sqrt().clamp(min=ROW_NORM) if equal else svd.s.new_full((count,), row_norm)
    down = svd.vh[:count] * norms[:, None]
    up = svd.u[:, :count] * (svd.s[:count] / norms)
    if rank > count:
        down = torch.cat([down, fresh_rows(rank - count, down.shape[1]).to(down)])
        up = torch.cat([up, up.new_zeros(up.shape[0], rank - count)], dim=1)
    return down.float(), up.float()


def kaiming_rows(path: str, seed: int, row_norm: float = ROW_NORM) -> Callable[[int, int], torch.Tensor]:
    """A function (count, d_in) -> float32 [count, d_in] of U(-1/sqrt(d_in), 1/sqrt(d_in)), as torch.nn.Linear and most
    trainers start, or that scaled to another ``row_norm``. The numbers depend on module and seed only, whatever else
    is drawn."""

    def rows(count: int, d_in: int) -> torch.Tensor:
        import torch

        digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return (torch.rand(count, d_in, generator=generator) * 2 - 1) * (row_norm / ROW_NORM / math.sqrt(d_in))

    return rows


@dataclass
class Resizer:
    """Makes factors of the wanted ranks, a module at a time. ``singular_values`` holds those of every module that was
    made so far, float64."""

    lora: Lora
    ranks: Mapping[str, int]
    exact: bool = False
    seed: int = 0
    row_norms: Callable[[str], float] = lambda path: ROW_NORM
    equal: bool = False
    singular_values: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, path: str) -> Pair:
        row_norm = self.row_norms(path)
        fresh_rows = kaiming_rows(path, self.seed, row_norm)
        if path not in self.lora.specs:
            return self._fresh_module(path, fresh_rows)
        with one_thread():
            svd = _module_svd(self.lora, path, self.exact, self.ranks[path])
            self.singular_values[path] = svd.s.double()
            return factors_of_rank(svd, self.ranks[path], fresh_rows, row_norm, equal=self.equal)

    def _fresh_module(self, path: str, fresh_rows: Callable[[int, int], torch.Tensor]) -> Pair:
        """A module without an update, as a trainer makes it."""
        import torch

        d_out, d_in = self.lora.arch.modules[path].shape
        return fresh_rows(self.ranks[path], d_in), torch.zeros(d_out, self.ranks[path])

    def effect_kept(self) -> dict[str, float]:
        """`effect_kept` of the modules that were made so far."""
        return effect_kept(self.lora.arch, self.singular_values, self.ranks)


def resize(
    lora: Lora,
    rank: int | Mapping[str, int],
    *,
    exact: bool = False,
    seed: int = 0,
    fill: Iterable[str] = (),
    row_norms: Callable[[str], float] = lambda path: ROW_NORM,
    equal: bool = False,
) -> Lora:
    """``lora`` at another rank, lower or higher: one for all modules, or one by module path. Factors are float32.

    ``fill`` names further modules of the architecture, which start without an update; ``row_norms`` gives the norm of a
    module's down rows, only of fresh ones where the others are to be as long as the columns of up (``equal``, see
    `factors_of_rank`). Nothing is computed before the factors are asked for. Raises UserError for a rank out of range.
    """
    filled = set(fill).difference(lora.specs)
    paths = [*lora.specs, *(path for path in lora.arch.modules if path in filled)]
    ranks = dict.fromkeys(paths, rank) if isinstance(rank, int) else {path: rank[path] for path in paths}
    wrong = next((r for r in ranks.values() if not 0 < r <= RANK_LIMIT), None)
    if wrong is not None:
        raise UserError(f"The rank must be from 1 to {RANK_LIMIT}, not {wrong}.", "out_of_range")
    specs = {path: FactorSpec(ranks[path], "F32") for path in paths}
    return replace(lora, specs=specs, load=Resizer(lora, ranks, exact, seed, row_norms, equal))


def resizer_of(resized: Lora) -> Resizer:
    """What makes the factors of a LoRA that `resize` gave. Raises TypeError for another."""
    if not isinstance(resized.load, Resizer):
        raise TypeError("This LoRA was not resized.")
    return resized.load


def effect_kept(arch: Architecture, values: Mapping[str, torch.Tensor], ranks: Mapping[str, int]) -> dict[str, float]:
    """The share of sum(s^2) that ``ranks`` keep, 0 to 1: by kind of layer and, under ``all``, of all modules.

    ``values``: singular values by module path, descending.
    """
    sums: dict[str, list[float]] = {}
    for path, module_values in values.items():
        squares = module_values.square()
        for key in (arch.modules[path].kind.name, "all"):
            entry = sums.setdefault(key, [0.0, 0.0])
            entry[0] += float(squares[: ranks[path]].sum())
            entry[1] += float(squares.sum())
    sums["all"] = sums.pop("all", [0.0, 0.0])  # last, as a sum stands below a table
    return {key: part / whole if whole else 1.0 for key, (part, whole) in sums.items()}


def rank_for(values: Sequence[torch.Tensor], share: float) -> int:
    """The lowest rank, the same for all modules, that keeps at least ``share`` (0 to 1) of their effect together.

    ``values``: the modules' singular values, descending.
    """
    squares = [module_values.square() for module_values in values]
    total = sum(float(module_squares.sum()) for module_squares in squares)
    longest = max(len(module_squares) for module_squares in squares)
    kept = 0.0
    for rank in range(longest):
        kept += sum(float(module_squares[rank]) for module_squares in squares if rank < len(module_squares))
        if kept >= share * total:
            return rank + 1
    return longest


def ranks_for(values: Mapping[str, torch.Tensor], share: float) -> dict[str, int]:
    """For each module the lowest rank that keeps at least ``share`` of its own effect."""
    return {path: rank_for([module_values], share) for path, module_values in values.items()}


def ranks_of_same_size(arch: Architecture, values: Mapping[str, torch.Tensor], rank: int) -> dict[str, int]:
    """The ranks by module that keep the most effect in a file no larger than one of uniform ``rank``; at least 1 each.

    A singular value costs d_out + d_in numbers and brings s^2. The values descend, so taking the best ratios first is
    optimal up to the last one that fits.
    """
    cost = {path: sum(arch.modules[path].shape) for path in values}
    budget = sum(cost.values()) * (rank - 1)
    ranks = dict.fromkeys(values, 1)
    offers = (
        (float(s) ** 2 / cost[path], path)
        for path, module_values in values.items()
        for s in module_values[1:]
        if float(s) > 0
    )
    for _, path in sorted(offers, reverse=True):
        if cost[path] <= budget:
            budget -= cost[path]
            ranks[path] += 1
    return ranks
