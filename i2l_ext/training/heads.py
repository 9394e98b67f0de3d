"""Trainable i2L heads, with the key names and the behaviour of the files that `i2l_ext.decoder` reads.

Two kinds. *Direct*, that of the published models: embedding -> compressed -> down, and beside it -> up. *Core*,
after the authors' later paper (arXiv 2606.13809): a learned pair of rank r a matrix, and between them an r x r
matrix that the embedding gives. Down and up are then B @ core(x) and A, of rank r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from i2l_ext.converters.architectures import Architecture, LayerKind, Module

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By module path: down [N, rank, d_in] and up [N, d_out, rank], one LoRA a sample."""


class Compressed(nn.Module):
    """Two linear maps with nothing between them but the block's residual."""

    def __init__(self, d_in: int, compress: int, d_out: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(d_in, compress, bias=False)
        self.proj_out = nn.Linear(compress, d_out, bias=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        middle = self.proj_in(x)
        return self.proj_out(middle if residual is None else middle + residual)


class Direct(nn.Module):
    """Published kind: x [N, E] -> down [N, rank, d_in], up [N, d_out, rank]."""

    def __init__(self, kind: LayerKind, embedding: int, compress: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = (rank, kind.d_in), (kind.d_out, rank)
        self.proj_a = Compressed(embedding, compress, rank * kind.d_in)
        self.proj_b = Compressed(embedding, compress, rank * kind.d_out)
        with torch.no_grad():
            self.proj_a.proj_in.weight *= 0.3
            self.proj_a.proj_out.weight *= 0.3
            self.proj_b.proj_out.weight.zero_()

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.proj_a(x, residual).unflatten(1, self.down), self.proj_b(x, residual).unflatten(1, self.up)


class Core(nn.Module):
    """Later kind: x [N, E] -> down [N, rank, d_in] (the same for all), up [N, d_out, rank] = B @ core(x)."""

    def __init__(self, kind: LayerKind, embedding: int, compress: int, rank: int) -> None:
        super().__init__()
        self.square = (rank, rank)
        self.query_a = nn.Parameter(torch.randn(rank, kind.d_in) / kind.d_in**0.5)
        self.query_b = nn.Parameter(torch.randn(kind.d_out, rank) / rank**0.5)
        self.core = Compressed(embedding, compress, rank * rank)
        nn.init.zeros_(self.core.proj_out.weight)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        core = self.core(x, residual).unflatten(1, self.square)
        return self.query_a.expand(len(x), -1, -1), self.query_b @ core


class Residual(nn.Module):
    """The tokens' way into a block: [N, L, D] -> a token at a time to ``middle`` -> all together to ``compress``."""

    def __init__(self, length: int, width: int, middle: int, compress: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, middle, bias=False)
        self.proj_out = nn.Linear(length * middle, compress, bias=False)
        with torch.no_grad():
            self.proj_out.weight *= 0.3

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.proj_in(tokens).flatten(1))


class Block(nn.Module):
    """The heads of one group in one transformer block."""

    def __init__(
        self, modules: list[Module], head: Callable[[LayerKind], nn.Module], residual: Residual | None
    ) -> None:
        super().__init__()
        self.paths = [module.path for module in modules]
        self.layers = nn.ModuleList(head(module.kind) for module in modules)
        self.proj_residual = residual

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None) -> Pairs:
        residual = self.proj_residual(tokens) if self.proj_residual is not None else None
        return {path: head(x, residual) for path, head in zip(self.paths, self.layers, strict=True)}


RESIDUAL_SCALE = 0.05
KINDS: dict[str, type[nn.Module]] = {"direct": Direct, "core": Core}


class Heads(nn.Module):
    """A whole i2L model: embeddings [N, E], and for some tokens [N, L, D], to one LoRA a sample.

    ``evened`` [E, E] is what embeddings are multiplied by on the way in while training (None: nothing): the heads are
    linear, so `folded` can leave it to their first matrices, and a file of heads does not know of it.
    """

    evened: torch.Tensor | None

    def __init__(
        self,
        arch: Architecture,
        *,
        embedding: int,
        compress: int,
        rank: int,
        kind: str = "direct",
        residual: tuple[int, int, int] | None = None,
    ) -> None:
        """``residual``: length, width and middle width of the tokens' way in."""
        super().__init__()
        groups: dict[tuple[int | None, int | None], list[Module]] = {}
        for module in arch.i2l_modules.values():
            groups.setdefault((module.kind.group, module.block), []).append(module)
        self.blocks = nn.ModuleList(
            Block(
                groups[key],
                lambda shape: KINDS[kind](shape, embedding, compress, rank),
                Residual(*residual, compress) if residual else None,
            )
            for key in sorted(groups)
        )
        self.register_buffer("evened", None, persistent=False)

    def folded(self) -> dict[str, torch.Tensor]:
        """The weights of the same heads without ``evened``."""
        weights = {key: value.detach() for key, value in self.state_dict().items()}
        if self.evened is not None:
            for key in weights:
                if key.endswith(".proj_in.weight") and "proj_residual" not in key:
                    weights[key] = weights[key] @ self.evened.T
        return weights

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None = None) -> Pairs:
        x = x if self.evened is None else x @ self.evened
        tokens = None if tokens is None else tokens * RESIDUAL_SCALE
        return {path: pair for block in self.blocks for path, pair in block(x, tokens).items()}


def evening(x: torch.Tensor, floor: float) -> torch.Tensor:
    """The symmetric matrix [E, E] that gives the embeddings [N, E] the same power in every direction, and leaves them
    as large as they are on the whole (ZCA whitening; Kessy et al. 2018, arXiv 1512.00809, about 0 and not the mean).

    Directions with less than ``floor`` times the mean power are not raised further: they are mostly noise.
    """
    x = x.double()
    power, directions = torch.linalg.eigh(x.T @ x / len(x))
    matrix = directions @ torch.diag((power + floor * power.mean()).rsqrt()) @ directions.T
    return (matrix * (x.square().mean() / (x @ matrix).square().mean()).sqrt()).float()


class PerSample:
    """Gives a frozen base another LoRA for each sample of a batch, through hooks on its linear layers.

    ``pairs`` is what the next forward adds; several LoRAs are concatenated along rank. The hooks stay until
    ``remove``, so that gradient checkpointing meets the same LoRAs when it runs a block again.
    """

    def __init__(self, model: nn.Module, paths: Mapping[str, object]) -> None:
        self.pairs: Pairs = {}
        self._handles = [model.get_submodule(path).register_forward_hook(self._hook(path)) for path in paths]

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], torch.Tensor]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            if path not in self.pairs:
                return out
            down, up = self.pairs[path]
            x = inputs[0] if inputs[0].ndim == 3 else inputs[0].unsqueeze(1)
            update = (x @ down.transpose(1, 2).to(x)) @ up.transpose(1, 2).to(x)
            return out + update.reshape(out.shape)

        return add

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def joined(*parts: Pairs) -> Pairs:
    """Their sum: down rows and up columns stand side by side. Parts of one sample serve a whole batch."""
    return {
        path: (torch.cat([part[path][0] for part in parts], 1), torch.cat([part[path][1] for part in parts], 2))
        for path in parts[0]
    }
