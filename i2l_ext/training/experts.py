"""The experts' losses: heads that make a LoRA of each reference, judged by what the frozen base then draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from i2l_ext.converters import files
from i2l_ext.converters.architectures import Architecture
from i2l_ext.converters.atomic import atomic_path
from i2l_ext.converters.lora import Lora

from .config import Expert
from .examples import Examples
from .flow import mixed, times
from .heads import Heads, Pairs, PerSample, evening, joined
from .loop import Task


class Backbone(Protocol):
    """A frozen base: its architecture, its transformer, and ``base(x, t, text, mask)`` -> velocity."""

    arch: Architecture
    transformer: nn.Module

    def __call__(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor: ...


class Static(nn.Module):
    """One LoRA for every sample: the bias. Starts without effect."""

    def __init__(self, arch: Architecture, rank: int) -> None:
        super().__init__()
        self.paths = list(arch.i2l_modules)
        shapes = [module.shape for module in arch.i2l_modules.values()]
        self.downs = nn.ParameterList(torch.randn(rank, d_in) / d_in**0.5 for _, d_in in shapes)
        self.ups = nn.ParameterList(torch.zeros(d_out, rank) for d_out, _ in shapes)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor | None = None) -> Pairs:
        count = len(image)
        return {
            path: (down.expand(count, -1, -1), up.expand(count, -1, -1))
            for path, down, up in zip(self.paths, self.downs, self.ups, strict=True)
        }


def build(expert: Expert, arch: Architecture, examples: Examples) -> nn.Module:
    """The expert's trainable module, sized by the examples."""
    if expert.kind == "bias":
        return Static(arch, expert.rank)
    residual = (*examples.tokens[expert.view].shape[1:], expert.middle) if expert.view else None
    return Heads(
        arch,
        embedding=examples.image.shape[1],
        compress=expert.compress,
        rank=expert.rank,
        kind=expert.kind,
        residual=residual,
    )


def save(module: nn.Module, arch: Architecture, path: Path) -> None:
    """Heads in bf16 under the published key names; a bias as the LoRA file it is."""
    if isinstance(module, Static):
        pairs = zip(module.paths, module.downs, module.ups, strict=True)
        factors = {path: (down.detach().bfloat16(), up.detach().bfloat16()) for path, down, up in pairs}
        Lora.of(arch, factors).save(path, "diffsynth", overwrite=True)
        return
    with atomic_path(path, overwrite=True) as part:
        files.save_file({key: value.bfloat16() for key, value in module.folded().items()}, part)


def load(expert: Expert, arch: Architecture, examples: Examples, path: Path) -> nn.Module:
    """Heads as they were saved, frozen, in fp32."""
    heads = build(expert, arch, examples)
    heads.load_state_dict({key: value.float() for key, value in files.load_file(path).items()})
    return heads.eval().requires_grad_(False)


def task(
    expert: Expert,
    base: Backbone,
    examples: Examples,
    under: Sequence[tuple[Expert, nn.Module]],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Task:
    """Training of one expert on top of frozen ones. ``dtype``: what the base computes in, None for its own."""
    torch.manual_seed(seed)
    module = build(expert, base.arch, examples)
    if expert.even:
        module.evened = evening(examples.image, expert.even).to(device)
    hooks = PerSample(base.transformer, base.arch.i2l_modules)
    batch = expert.schedule.batch

    def pairs_of(heads: nn.Module, view: int, rows: torch.Tensor) -> Pairs:
        tokens = examples.tokens[view][rows].float().to(device) if view else None
        return heads(examples.image[rows].float().to(device), tokens)

    def loss(model: nn.Module, rng: torch.Generator, mine: slice) -> torch.Tensor:
        references = torch.randint(len(examples), (batch,), generator=rng)
        silent = torch.rand(batch, generator=rng) < expert.neutral
        t = times(batch, rng)
        if expert.target == "base" and examples.own is not None and examples.own_caption is not None:
            drawn = torch.randint(len(examples.own), (batch,), generator=rng)
            x, captioned = examples.own[drawn], examples.own_caption[drawn]
        else:
            captioned = examples.partner(references, rng) if expert.target == "pair" else references
            x = examples.latents[captioned]
        noise = torch.randn(x.shape, generator=rng)
        x_t, target = mixed(x.float(), t, noise)
        text, mask = examples.captions(captioned, silent)

        with torch.no_grad():
            parts = [pairs_of(heads, frozen.view, references[mine]) for frozen, heads in under]
        parts.append(pairs_of(model, expert.view, references[mine]))
        hooks.pairs = joined(*parts) if len(parts) > 1 else parts[0]
        inputs = [part[mine].to(device) for part in (x_t, t, text, mask)]
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            said = base(*inputs)
        return F.mse_loss(said.float(), target[mine].to(device))

    return Task(expert.name, module, loss, expert.schedule, seed)
