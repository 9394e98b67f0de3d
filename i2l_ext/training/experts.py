"""Experts, the trained parts of an i2L model: how they are built, saved and loaded, and their loss.

An expert makes a LoRA of each reference picture. Its loss is that of flow matching, of the frozen base with this LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from i2l_ext.converters.architectures import Architecture
from i2l_ext.converters.files import load_file
from i2l_ext.converters.lora import Lora

from .base import FrozenBase
from .config import ExpertConfig
from .examples import Examples
from .flow import add_noise, sample_timesteps
from .heads import LoraFactors, PerSampleLora, TrainableHeads, concatenate_factors, whitening_matrix
from .loop import TrainingTask, save_tensors
from .queries import References, TrainableQueries, whitened_tokens


class StaticLora(nn.Module):
    """The bias: the same LoRA for every sample, without effect at first."""

    def __init__(self, arch: Architecture, rank: int) -> None:
        super().__init__()
        self.paths = list(arch.i2l_modules)
        shapes = [module.shape for module in arch.i2l_modules.values()]
        self.downs = nn.ParameterList(torch.randn(rank, d_in) / d_in**0.5 for _, d_in in shapes)
        self.ups = nn.ParameterList(torch.zeros(d_out, rank) for d_out, _ in shapes)

    def factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """By module path: down [rank, d_in] and up [d_out, rank]."""
        return dict(zip(self.paths, zip(self.downs, self.ups, strict=True), strict=True))

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None = None) -> LoraFactors:
        count = len(x)
        return {
            path: (down.expand(count, -1, -1), up.expand(count, -1, -1)) for path, (down, up) in self.factors().items()
        }


def build_expert(expert: ExpertConfig, arch: Architecture, examples: Examples) -> nn.Module:
    """The untrained module of an expert, for embeddings of the sizes that the examples have."""
    if expert.kind == "bias":
        return StaticLora(arch, expert.rank)
    if expert.kind == "queries":
        return TrainableQueries(arch, whitened_tokens(examples).shape[1], expert)
    residual = (*examples.tokens[expert.view].shape[1:], expert.middle) if expert.view else None
    return TrainableHeads(
        arch,
        embedding=examples.image.shape[1],
        compress=expert.compress,
        rank=expert.rank,
        kind=expert.kind,
        residual=residual,
    )


def save_expert(module: nn.Module, arch: Architecture, path: Path) -> None:
    """Write heads in bf16 under the published key names, or a bias as a LoRA file. Raises UserError."""
    if isinstance(module, StaticLora):
        factors = {path: (d.detach().bfloat16(), u.detach().bfloat16()) for path, (d, u) in module.factors().items()}
        Lora.of(arch, factors).save(path, "diffsynth", overwrite=True)
    else:
        save_tensors(path, {key: value.bfloat16() for key, value in module.folded_state_dict().items()})


def load_expert(expert: ExpertConfig, arch: Architecture, examples: Examples, path: Path) -> nn.Module:
    """Saved heads, frozen, in fp32."""
    heads = build_expert(expert, arch, examples)
    heads.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return heads.eval().requires_grad_(False)


def expert_task(
    expert: ExpertConfig,
    base: FrozenBase,
    examples: Examples,
    frozen: Sequence[tuple[ExpertConfig, nn.Module]],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> TrainingTask:
    """The training of an expert. ``frozen`` are the experts whose LoRAs are applied with it. ``dtype`` is what the
    base computes in, None for its own."""
    torch.manual_seed(seed)
    module = build_expert(expert, base.arch, examples)
    together = isinstance(module, TrainableQueries)
    if expert.even:
        seen = whitened_tokens(examples) if together else examples.image
        module.whitening = whitening_matrix(seen, expert.even).to(device)
    hooks = PerSampleLora(base.transformer, base.arch.i2l_modules)
    batch = expert.schedule.batch
    repeats = expert.queries.timesteps if together else 1

    def factors(heads: nn.Module, view: int, rows: torch.Tensor) -> LoraFactors:
        tokens = examples.tokens[view][rows].float().to(device) if view else None
        return heads(examples.image[rows].float().to(device), tokens)

    def loss(model: nn.Module, rng: torch.Generator, local: slice) -> torch.Tensor:
        references = torch.randint(len(examples), (batch,), generator=rng)
        neutral = torch.rand(batch, generator=rng) < expert.neutral
        t = sample_timesteps(batch * repeats, rng)
        if expert.target == "base" and examples.own is not None and examples.own_caption is not None:
            targets = torch.randint(len(examples.own), (batch,), generator=rng)
            x, captioned = examples.own[targets], examples.own_caption[targets]
        else:
            pair = expert.target == "pair" and not together
            captioned = examples.sample_same_style(references, rng) if pair else references
            x = examples.latents[captioned]
        text, mask = examples.captions(captioned, neutral)
        if together:  # the rows drawn are the targets
            tokens = References.sample(expert, examples, captioned, rng).tokens(examples, local)

        with torch.no_grad():
            parts = [factors(heads, other.view, references[local]) for other, heads in frozen]
        parts.append(model(tokens.to(device)) if together else factors(model, expert.view, references[local]))
        made = concatenate_factors(*parts) if len(parts) > 1 else parts[0]
        # each sample as often as it has timesteps, next to each other
        hooks.factors = {path: tuple(_repeated(one, repeats) for one in pair) for path, pair in made.items()}
        x, text, mask = (_repeated(part[local], repeats) for part in (x, text, mask))
        t = t.view(batch, repeats)[local].flatten()
        noise = torch.randn(batch, repeats, *x.shape[1:], generator=rng)[local].flatten(0, 1)
        x_t, velocity = add_noise(x.float(), t, noise)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            predicted = base(*(part.to(device) for part in (x_t, t, text, mask)))
        return F.mse_loss(predicted.float(), velocity.to(device))

    return TrainingTask(expert.name, module, loss, expert.schedule, seed)


def _repeated(values: torch.Tensor, repeats: int) -> torch.Tensor:
    """Each row of values [N, ...] so many times, next to each other."""
    return values.repeat_interleave(repeats, 0) if repeats > 1 else values
