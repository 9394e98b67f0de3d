"""The single-stream transformer of arXiv 2606.13809, as functions of its weights: learned queries and the patch tokens
of all pictures go through it together, and the vectors of the queries come out.

The paper gives neither norms nor attention nor MLP. Chosen here: RMS norms before attention and MLP, and on each
head's queries and keys; a gated MLP (SwiGLU); no positions, as SigLIP2's tokens have theirs, so the order of the
pictures does not matter. Decoder and training share these functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor
from torch.nn import functional as F

from i2l_ext.decoder.spec import DecoderSpec
from i2l_ext.weights.compute import Callbacks, ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.stream import TensorLoader, stream

EPSILON = 1e-6

Weights = Mapping[str, Tensor]


def enter(queries: Tensor, tokens: Tensor, weights: Weights) -> Tensor:
    """Queries [Q, width] and tokens [B, N, T, token] of N pictures each, as one sequence [B, Q + N x T, width]."""
    seen = F.linear(tokens.flatten(1, 2), weights["image.weight"], weights["image.bias"])
    return torch.cat([queries.expand(len(tokens), -1, -1), seen], dim=1)


def picture_bias(weights: Tensor, queries: int, tokens: int) -> Tensor:
    """What is added to the logits of attention, [B, 1, 1, Q + N x T], for the weights [B, N] of N pictures of T tokens.

    It is log w for the tokens of a picture: each counts w times. The largest weight of a row counts as 1. So equal
    weights are no weights, and a picture whose weight goes to 0 is as if it were left out.
    """
    shares = (weights / weights.amax(1, keepdim=True)).log().repeat_interleave(tokens, dim=1)
    return F.pad(shares, (queries, 0))[:, None, None]


def block(x: Tensor, weights: Weights, head_dim: int, bias: Tensor | None = None) -> Tensor:
    """One block: x [B, S, width] to the same. ``weights`` by the names in ``TransformerSpec.block``; ``bias`` as
    ``picture_bias`` gives it."""
    parts = F.linear(_norm(x, weights["attention_norm.weight"]), weights["attention.qkv.weight"])
    query, key, value = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in parts.chunk(3, dim=-1))
    query, key = _norm(query, weights["attention.norm_q.weight"]), _norm(key, weights["attention.norm_k.weight"])
    mask = None if bias is None else bias.to(query)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
    x = x + F.linear(mixed, weights["attention.out.weight"])
    gate, up = F.linear(_norm(x, weights["mlp_norm.weight"]), weights["mlp.up.weight"]).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, weights["mlp.down.weight"])


def leave(x: Tensor, queries: int, weights: Weights) -> Tensor:
    """The vectors of the queries, [B, Q, width], of a sequence [B, S, width]."""
    return _norm(x[:, :queries], weights["norm.weight"])


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm over the last dimension, in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x) * weight


@torch.no_grad()
def written_vectors(
    files: TensorFiles,
    spec: DecoderSpec,
    tokens: Tensor,
    shares: Sequence[float],
    options: ComputeOptions,
    callbacks: Callbacks,
) -> dict[str, Tensor]:
    """What the transformer makes of each head's queries, {key of the head: [2 x rank, width]}, for the tokens [N, T,
    token] of N pictures that count as ``shares`` say.

    Its weights are read once, a block at a time; the next block is read while one is in use. Raises UserError as
    ``stream`` does, Cancelled when the user wants to stop.
    """
    transformer = spec.transformer
    if transformer is None:
        raise ValueError(f"heads of the kind {spec.kind} have no transformer")
    loader = TensorLoader(files, options)
    first = {key: key for key in (*spec.queries, *transformer.ends)}
    weights = loader.read(first, loader.buffer(loader.nbytes(first)))
    queries = torch.cat([weights[key] for key in spec.queries])
    x = enter(queries, options.place(tokens)[None], weights)
    bias = None
    if len(set(shares)) > 1:
        bias = picture_bias(torch.tensor([shares], dtype=torch.float32), len(queries), tokens.shape[1])
    groups = [transformer.names(number) for number in range(transformer.depth)]
    with closing(stream(files, groups, options, callbacks)) as blocks:
        for own in blocks:
            x = block(x, own, transformer.head_dim, bias)
    return dict(zip(spec.tensors, leave(x, len(queries), weights)[0].split(2 * spec.rank), strict=True))
