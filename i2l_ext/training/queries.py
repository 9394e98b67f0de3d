"""The trainable predictor of arXiv 2606.13809, with the key names and the results of the files that `i2l_ext.decoder`
reads; and which pictures it sees in a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from i2l_ext.converters.architectures import Architecture
from i2l_ext.decoder import transformer
from i2l_ext.decoder.spec import DecoderSpec, TransformerSpec

from .config import ExpertConfig
from .examples import Examples
from .heads import LoraFactors

WHITENED = 1 << 18
"""Tokens at most from which the whitening is computed."""


class TrainableQueries(nn.Module):
    """Patch tokens [B, N, T, D] of N pictures for each of B samples -> a LoRA for each sample, at first without effect.

    ``whitening`` [D, D] multiplies the tokens while training, as in `TrainableHeads`.
    """

    whitening: torch.Tensor | None

    def __init__(self, arch: Architecture, token: int, expert: ExpertConfig) -> None:
        """``token``: the width D of a token. The sizes are those of ``expert``."""
        super().__init__()
        sizes = expert.queries
        head_dim = sizes.width // sizes.heads
        self.inside = TransformerSpec(token, sizes.width, sizes.depth, sizes.heads, head_dim, sizes.mlp)
        self.spec = DecoderSpec(
            arch, sizes.width, expert.compress, expert.rank, kind="queries", transformer=self.inside
        )
        # a parameter's name may not hold a dot
        self.weights = nn.ParameterDict({_name(key): _start(key, shape) for key, shape in self.spec.shapes.items()})
        self.register_buffer("whitening", None, persistent=False)

    def folded_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, by the keys of the file, that give the same LoRAs without whitening."""
        weights = {key: self.weights[_name(key)].detach() for key in self.spec.shapes}
        if self.whitening is not None:
            weights["image.weight"] = weights["image.weight"] @ self.whitening.T
        return weights

    def forward(self, tokens: torch.Tensor) -> LoraFactors:
        weights = {key: self.weights[_name(key)] for key in self.spec.shapes}
        tokens = tokens if self.whitening is None else tokens @ self.whitening
        queries = torch.cat([weights[key] for key in self.spec.queries])
        x = transformer.enter(queries, tokens, weights)
        for number in range(self.inside.depth):
            own = {name: weights[key] for name, key in self.inside.names(number).items()}
            x = transformer.block(x, own, self.inside.head_dim)
        vectors = iter(transformer.leave(x, len(queries), weights).split(self.spec.rank, dim=1))
        return dict(self._factors(weights, vectors))

    def _factors(
        self, weights: dict[str, torch.Tensor], vectors: Iterator[torch.Tensor]
    ) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
        for path, head in self.spec.heads.items():
            down, up = (
                F.linear(
                    F.linear(next(vectors), weights[f"{head.key}.{side}.proj_in.weight"]),
                    weights[f"{head.key}.{side}.proj_out.weight"],
                )
                for side in ("proj_a", "proj_b")
            )
            yield path, (down, up.transpose(1, 2))


def _name(key: str) -> str:
    return key.replace(".", "/")


def _start(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor at the start of the training: rows of A as long as a LoRA's usually are, columns of B of zeros."""
    if len(shape) == 1:
        return torch.zeros(shape) if key == "image.bias" else torch.ones(shape)
    if key.endswith("proj_b.proj_out.weight"):
        return torch.zeros(shape)
    gain = 1.0 if "query" in key else 1 / math.sqrt(shape[1])
    if key.endswith("proj_a.proj_out.weight"):
        gain /= math.sqrt(shape[0])
    elif key.endswith(("attention.out.weight", "mlp.down.weight")):
        gain /= 2
    return gain * torch.randn(shape)


@dataclass(frozen=True)
class References:
    """The pictures of a batch: ``rows`` [B, N] of the examples; grey ones where ``grey`` [B] is true."""

    rows: torch.Tensor
    grey: torch.Tensor

    @classmethod
    def sample(
        cls, expert: ExpertConfig, examples: Examples, targets: torch.Tensor, rng: torch.Generator
    ) -> References:
        """Of the style of the rows ``targets`` [B], 1 to ``references`` each, as many for all samples of a step."""
        count = int(torch.randint(1, expert.queries.references + 1, (), generator=rng))
        rows = examples.sample_other_contents(targets, count, rng)
        if expert.target == "self":
            rows[:, 0] = targets
        return cls(rows, torch.rand(len(targets), generator=rng) < expert.queries.grey)

    def tokens(self, examples: Examples, local: slice) -> torch.Tensor:
        """Patch tokens float32 [b, N, T, D] of the samples in ``local``. ValueError for examples without any."""
        if examples.patches is None or examples.grey is None:
            raise ValueError("the examples have no patch tokens")
        seen = examples.patches[self.rows[local]]
        return torch.where(self.grey[local, None, None, None], examples.grey, seen).float()


def whitened_tokens(examples: Examples) -> torch.Tensor:
    """Tokens [M, D] from which the whitening is computed, evenly of all pictures."""
    if examples.patches is None:
        raise ValueError("the examples have no patch tokens")
    tokens = examples.patches.flatten(0, 1)
    return tokens[:: -(-len(tokens) // WHITENED)]
