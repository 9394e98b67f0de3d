"""Trainable i2L heads, with the key names and the results of the files that `i2l_ext.decoder` reads.

There are two kinds. *Direct*, that of the published models: embedding -> compressed -> down, and another such pair of
maps for up. *Core*, after the authors' later paper (arXiv 2606.13809): each LoRA layer has a learned pair A and B of
rank r, and the embedding gives an r x r matrix between them. Then up is B @ core(x) and down is A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from i2l_ext.converters.architectures import Architecture, LayerKind, Module
from i2l_ext.decoder.spec import RESIDUAL_SCALE

LoraFactors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By module path: down [N, rank, d_in] and up [N, d_out, rank]. Each of N samples has its own LoRA."""


class CompressedLinear(nn.Module):
    """Two linear maps: [N, d_in] -> [N, compress] -> [N, d_out]. A residual [N, compress] is added between them."""

    def __init__(self, d_in: int, compress: int, d_out: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(d_in, compress, bias=False)
        self.proj_out = nn.Linear(compress, d_out, bias=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        middle = self.proj_in(x)
        return self.proj_out(middle if residual is None else middle + residual)


class DirectHead(nn.Module):
    """A head of the published kind: x [N, E] -> down [N, rank, d_in], up [N, d_out, rank]."""

    def __init__(self, kind: LayerKind, embedding: int, compress: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = (rank, kind.d_in), (kind.d_out, rank)
        self.proj_a = CompressedLinear(embedding, compress, rank * kind.d_in)
        self.proj_b = CompressedLinear(embedding, compress, rank * kind.d_out)
        with torch.no_grad():
            self.proj_a.proj_in.weight *= 0.3
            self.proj_a.proj_out.weight *= 0.3
            self.proj_b.proj_out.weight.zero_()

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.proj_a(x, residual).unflatten(1, self.down), self.proj_b(x, residual).unflatten(1, self.up)


class CoreHead(nn.Module):
    """A head of the later kind: x [N, E] -> down [N, rank, d_in], the same for all samples, and up [N, d_out, rank]."""

    def __init__(self, kind: LayerKind, embedding: int, compress: int, rank: int) -> None:
        super().__init__()
        self.square = (rank, rank)
        self.query_a = nn.Parameter(torch.randn(rank, kind.d_in) / kind.d_in**0.5)
        self.query_b = nn.Parameter(torch.randn(kind.d_out, rank) / rank**0.5)
        self.core = CompressedLinear(embedding, compress, rank * rank)
        nn.init.zeros_(self.core.proj_out.weight)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        core = self.core(x, residual).unflatten(1, self.square)
        return self.query_a.expand(len(x), -1, -1), self.query_b @ core


class TokenProjector(nn.Module):
    """The residual of a block, from Qwen-VL's tokens: [N, L, D] -> [N, L, middle] -> [N, compress]."""

    def __init__(self, length: int, width: int, middle: int, compress: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, middle, bias=False)
        self.proj_out = nn.Linear(length * middle, compress, bias=False)
        with torch.no_grad():
            self.proj_out.weight *= 0.3

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.proj_in(tokens).flatten(1))


class HeadBlock(nn.Module):
    """The heads of one group in one transformer block."""

    def __init__(
        self, modules: list[Module], head: Callable[[LayerKind], nn.Module], residual: TokenProjector | None
    ) -> None:
        super().__init__()
        self.paths = [module.path for module in modules]
        self.layers = nn.ModuleList(head(module.kind) for module in modules)
        self.proj_residual = residual

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None) -> LoraFactors:
        residual = self.proj_residual(tokens) if self.proj_residual is not None else None
        return {path: head(x, residual) for path, head in zip(self.paths, self.layers, strict=True)}


HEAD_CLASSES: dict[str, type[nn.Module]] = {"direct": DirectHead, "core": CoreHead}


class TrainableHeads(nn.Module):
    """A whole i2L model: embeddings x [N, E], and for some models tokens [N, L, D], to a LoRA for each sample.

    ``whitening`` [E, E] multiplies the embeddings while training (None: nothing does). The heads are linear, so
    `folded_state_dict` can multiply it into their first matrices, and saved heads need no whitening.
    """

    whitening: torch.Tensor | None

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
        """``kind`` is a key of `HEAD_CLASSES`. ``residual``: length L, width D and middle width of `TokenProjector`."""
        super().__init__()
        groups: dict[tuple[int | None, int | None], list[Module]] = {}
        for module in arch.i2l_modules.values():
            groups.setdefault((module.kind.group, module.block), []).append(module)
        self.blocks = nn.ModuleList(
            HeadBlock(
                groups[key],
                lambda shape: HEAD_CLASSES[kind](shape, embedding, compress, rank),
                TokenProjector(*residual, compress) if residual else None,
            )
            for key in sorted(groups)
        )
        self.register_buffer("whitening", None, persistent=False)

    def folded_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights of heads without whitening that give the same LoRAs."""
        weights = {key: value.detach() for key, value in self.state_dict().items()}
        if self.whitening is not None:
            for key in weights:
                if key.endswith(".proj_in.weight") and "proj_residual" not in key:
                    weights[key] = weights[key] @ self.whitening.T
        return weights

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None = None) -> LoraFactors:
        x = x if self.whitening is None else x @ self.whitening
        tokens = None if tokens is None else tokens * RESIDUAL_SCALE
        return {path: pair for block in self.blocks for path, pair in block(x, tokens).items()}


def whitening_matrix(x: torch.Tensor, floor: float) -> torch.Tensor:
    """ZCA whitening of embeddings x [N, E] about 0: a symmetric matrix, float32 [E, E] (Kessy et al. 2018,
    arXiv 1512.00809).

    ``x @ matrix`` has the same power in every direction, and the same mean power as x. Directions with less than
    about ``floor`` times the mean power are raised less: they are mostly noise.
    """
    x = x.double()
    power, directions = torch.linalg.eigh(x.T @ x / len(x))
    matrix = directions @ torch.diag((power + floor * power.mean()).rsqrt()) @ directions.T
    return (matrix * (x.square().mean() / (x @ matrix).square().mean()).sqrt()).float()


class PerSampleLora:
    """Forward hooks that give each sample of a batch its own LoRA on a frozen model, or each of K equal, consecutive
    parts of the batch one of K LoRAs.

    ``factors`` is what the next forward uses; modules without an entry are not changed. Keep the hooks until after
    the backward pass: gradient checkpointing runs the forward again.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        """Hook the linear layers at ``paths`` of ``model``."""
        self.factors: LoraFactors = {}
        self._handles = [model.get_submodule(path).register_forward_hook(self._hook(path)) for path in paths]

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], torch.Tensor]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            if path not in self.factors:
                return out
            down, up = self.factors[path]
            x = inputs[0].reshape(len(down), -1, inputs[0].shape[-1])
            update = (x @ down.transpose(1, 2).to(x)) @ up.transpose(1, 2).to(x)
            return out + update.reshape(out.shape)

        return add

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def concatenate_factors(*parts: LoraFactors) -> LoraFactors:
    """The sum of several LoRAs, as one: down rows and up columns are concatenated along rank."""
    return {
        path: (torch.cat([part[path][0] for part in parts], 1), torch.cat([part[path][1] for part in parts], 2))
        for path in parts[0]
    }
