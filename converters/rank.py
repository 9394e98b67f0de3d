"""The rank of a LoRA: its spectrum, the best approximation of a lower rank, and growth that can learn.

An update up @ down has at most rank r, so its singular values are those of a core of r x r: QR of down^T and of up,
then the SVD of R_up @ R_down^T (Golub and Van Loan, Matrix Computations, 4th ed., 5.2 and 8.6). By Eckart and Young
its first k triples are the nearest update of rank k, in the Frobenius and the spectral norm. The dense update of
hundreds of millions of numbers is never formed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .errors import UserError
from .lora import Lora, Spec

if TYPE_CHECKING:
    import torch

    from .architectures import Architecture
    from .lora import Pair

ROW_NORM = 1 / math.sqrt(3)
"""Norm of a down row: what Kaiming's U(-1/sqrt(d_in), 1/sqrt(d_in)) gives on average, in a fresh LoRA. The singular
values stay in the up factor, so that a learning rate means the same for both."""
RANK_LIMIT = 4096


@dataclass(frozen=True)
class Triples:
    """delta = u @ diag(s) @ v with orthonormal columns of u [d_out, r] and rows of v [r, d_in]; s [r] descending."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor


def triples(down: torch.Tensor, up: torch.Tensor, *, exact: bool = False) -> Triples:
    """The singular triples of up [d_out, r] @ down [r, d_in], in float32, or float64 where ``exact``.

    There are min(d_out, r, d_in) of them at most.
    """
    import torch

    dtype = torch.float64 if exact else torch.float32
    q_down, r_down = torch.linalg.qr(down.to(dtype).mT)
    q_up, r_up = torch.linalg.qr(up.to(dtype))
    u, s, v = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return Triples(q_up @ u, s, v @ q_down.mT)


def spectra(lora: Lora, *, exact: bool = False) -> dict[str, torch.Tensor]:
    """The singular values of every module's update, descending, float64 [min(d_out, rank, d_in)]."""
    return {path: _triples_of(lora, path, exact).s.double() for path in lora}


def _triples_of(lora: Lora, path: str, exact: bool) -> Triples:
    down, up = lora[path]
    if not (down.isfinite().all() and up.isfinite().all()):
        raise UserError(f"{path}: the factors hold NaN or infinity.")
    return triples(down, up, exact=exact)


def factors(found: Triples, rank: int, fresh: Callable[[int, int], torch.Tensor]) -> Pair:
    """Factors of exactly ``rank``: the largest triples, down rows of norm 1/sqrt 3; what remains is fresh capacity.

    Fresh rows come from ``fresh(rows, d_in)`` and their up columns are zero: the update is unchanged and the columns
    have a gradient from the first step on. Zero rows *and* zero columns would stay zero for ever.
    """
    import torch

    count = min(rank, len(found.s))
    down = found.v[:count] * ROW_NORM
    up = found.u[:, :count] * (found.s[:count] / ROW_NORM)
    if rank > count:
        down = torch.cat([down, fresh(rank - count, down.shape[1]).to(down)])
        up = torch.cat([up, up.new_zeros(up.shape[0], rank - count)], dim=1)
    return down.float(), up.float()


def kaiming(path: str, seed: int) -> Callable[[int, int], torch.Tensor]:
    """Fresh down rows U(-1/sqrt(d_in), 1/sqrt(d_in)), as torch.nn.Linear and the trainers draw them; the same numbers
    for the same module and seed, whatever else is drawn."""

    def rows(count: int, d_in: int) -> torch.Tensor:
        import torch

        digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return (torch.rand(count, d_in, generator=generator) * 2 - 1) / math.sqrt(d_in)

    return rows


@dataclass
class Resizer:
    """Makes factors of the wanted ranks, a module at a time, and remembers the singular values it saw."""

    lora: Lora
    ranks: Mapping[str, int]
    exact: bool = False
    seed: int = 0
    seen: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, path: str) -> Pair:
        fresh = kaiming(path, self.seed)
        if path not in self.lora.specs:
            return self._empty(path, fresh)
        found = _triples_of(self.lora, path, self.exact)
        self.seen[path] = found.s.double()
        return factors(found, self.ranks[path], fresh)

    def _empty(self, path: str, fresh: Callable[[int, int], torch.Tensor]) -> Pair:
        """A module that starts from nothing, as a trainer makes it."""
        import torch

        d_out, d_in = self.lora.arch.modules[path].shape
        return fresh(self.ranks[path], d_in), torch.zeros(d_out, self.ranks[path])


def resize(
    lora: Lora, rank: int | Mapping[str, int], *, exact: bool = False, seed: int = 0, fill: Iterable[str] = ()
) -> Lora:
    """``lora`` at another rank, lower or higher: one for all, or one by module path. Factors are float32.

    ``fill`` names further modules of the architecture, which start as fresh capacity. Nothing is computed before the
    factors are asked for; `kept` then tells what the truncation kept. Raises UserError for a rank out of range.
    """
    filled = set(fill).difference(lora.specs)
    paths = [*lora.specs, *(path for path in lora.arch.modules if path in filled)]
    ranks = dict.fromkeys(paths, rank) if isinstance(rank, int) else {path: rank[path] for path in paths}
    wrong = next((r for r in ranks.values() if not 0 < r <= RANK_LIMIT), None)
    if wrong is not None:
        raise UserError(f"A rank of {wrong} cannot be had: choose 1 to {RANK_LIMIT}.")
    specs = {path: Spec(ranks[path], "F32") for path in paths}
    return replace(lora, specs=specs, load=Resizer(lora, ranks, exact, seed))


def resizer(resized: Lora) -> Resizer:
    """What makes the factors of a LoRA that `resize` gave. Raises TypeError for another."""
    if not isinstance(resized.load, Resizer):
        raise TypeError("This LoRA was not resized.")
    return resized.load


def energy(values: torch.Tensor, rank: int) -> float:
    """The part of sum(s^2) in the first ``rank`` singular values."""
    squares = values.square()
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total else 1.0


def kept(arch: Architecture, values: Mapping[str, torch.Tensor], ranks: Mapping[str, int]) -> dict[str, float]:
    """The energy kept by kind of layer and, under ``all``, in the whole: sum of s^2 kept / sum of s^2."""
    sums: dict[str, list[float]] = {}
    for path, spectrum in values.items():
        squares = spectrum.square()
        for key in (arch.modules[path].kind.name, "all"):
            entry = sums.setdefault(key, [0.0, 0.0])
            entry[0] += float(squares[: ranks[path]].sum())
            entry[1] += float(squares.sum())
    return {key: part / whole if whole else 1.0 for key, (part, whole) in sums.items()}


def rank_for(values: Sequence[torch.Tensor], share: float) -> int:
    """The smallest rank for all that keeps at least ``share`` of the energy of all ``values`` together."""
    squares = [spectrum.square() for spectrum in values]
    total = sum(float(spectrum.sum()) for spectrum in squares)
    longest = max(len(spectrum) for spectrum in squares)
    found = 0.0
    for rank in range(longest):
        found += sum(float(spectrum[rank]) for spectrum in squares if rank < len(spectrum))
        if found >= share * total:
            return rank + 1
    return longest


def ranks_for(values: Mapping[str, torch.Tensor], share: float) -> dict[str, int]:
    """For each module the smallest rank that keeps at least ``share`` of its own energy."""
    return {path: rank_for([spectrum], share) for path, spectrum in values.items()}


def ranks_within(arch: Architecture, values: Mapping[str, torch.Tensor], rank: int) -> dict[str, int]:
    """Ranks by module that keep the most energy in a file no larger than one of uniform ``rank``; at least 1 each.

    A triple costs d_out + d_in numbers and brings s^2; the spectra descend, so taking the best ratios first is
    optimal up to the last triple that fits.
    """
    cost = {path: sum(arch.modules[path].shape) for path in values}
    budget = sum(cost.values()) * (rank - 1)
    ranks = dict.fromkeys(values, 1)
    offers = (
        (float(s) ** 2 / cost[path], path) for path, spectrum in values.items() for s in spectrum[1:] if float(s) > 0
    )
    for _, path in sorted(offers, reverse=True):
        if cost[path] <= budget:
            budget -= cost[path]
            ranks[path] += 1
    return ranks
