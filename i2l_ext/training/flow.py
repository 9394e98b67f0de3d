"""Flow matching as Qwen-Image has it: x_t = (1 - t) * x + t * noise, and the model's velocity is noise - x."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def run_transformer(
    transformer: nn.Module,
    x: torch.Tensor,
    t: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor,
    patch: int,
    extra: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output of a QwenImageTransformer2DModel for images: x [N, C, H, W], timesteps t [N] in 0..1,
    text [N, L, D], mask [N, L] -> [N, C, H, W].

    A patch of ``patch`` x ``patch`` pixels becomes one token, its channels outermost, as in diffusers' pipeline.
    ``extra`` [tokens, P] is appended to the tokens of every image.
    """
    height, width = x.shape[2] // patch, x.shape[3] // patch
    tokens = F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)
    if extra is not None:
        tokens = torch.cat([tokens, extra.to(tokens).expand(len(x), -1, -1)], dim=2)
    out = transformer(
        hidden_states=tokens,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        timestep=t,
        img_shapes=[[(1, height, width)]] * len(x),
        return_dict=False,
    )[0]
    return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (height, width)), patch)


def sample_timesteps(count: int, rng: torch.Generator) -> torch.Tensor:
    """Logit-normal timesteps [count] in 0..1, a little towards noise (Esser et al. 2024, section 3.1: m = 0.3,
    s = 1.2)."""
    return _logit_normal(torch.randn(count, generator=rng))


def timestep_quantiles(count: int) -> torch.Tensor:
    """Timesteps [count] that stand for the distribution of `sample_timesteps`: the middles of its equal parts."""
    return _logit_normal(torch.special.ndtri((torch.arange(count) + 0.5) / count))


def _logit_normal(normal: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(1.2 * normal + 0.3)


def add_noise(x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and the velocity from x to noise, each [N, C, H, W], for x and noise [N, C, H, W] and t [N]."""
    weight = t.view(-1, 1, 1, 1).to(x)
    return torch.lerp(x, noise, weight), noise - x
