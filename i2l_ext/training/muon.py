"""Muon for matrices and AdamW for everything else, as one optimiser.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") replaces the momentum of a matrix
by the nearest orthogonal matrix, which a few Newton-Schulz steps find. Small models learn with it in about half the
steps.

torch.optim.Muon does not replace this class. It came with torch 2.9, and we support 2.3. It takes matrices only, one at
a time; here those of one shape are batched, because for small ones the calls cost more than the arithmetic. And it
rounds differently, so the shipped weights could not be trained again byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

MOMENTUM = 0.95
BETAS = (0.9, 0.99)
EPS = 1e-8


class Muon(torch.optim.Optimizer):
    """``lr`` is AdamW's learning rate; that of a matrix is ``lr * matrix_scale``, in units of its spectral norm."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, matrix_scale: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "matrix_scale": matrix_scale, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step with the gradients at hand. ``closure`` is not called."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            rest: list[nn.Parameter] = []
            for p in group["params"]:
                if p.grad is not None:
                    (shapes.setdefault(p.shape, []) if p.ndim >= 2 else rest).append(p)
            for matrices in shapes.values():
                self._muon_step(matrices, group)
            if rest:
                self._adamw_step(rest, group)

    def _muon_step(self, params: list[nn.Parameter], group: dict) -> None:
        """One step of matrices [m, n], all of the same shape. A convolution's kernels [m, ...] are the rows of one."""
        momenta = [self._state(p, "momentum") for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
        lookahead = torch._foreach_lerp(grads, momenta, MOMENTUM)
        matrices = torch.stack(lookahead).flatten(2)
        rows, columns = matrices.shape[1:]
        updates = orthogonalize(matrices) * max(1, rows / columns) ** 0.5
        rate = group["lr"] * group["matrix_scale"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(updates.view(-1, *params[0].shape).unbind()), alpha=-rate)

    def _adamw_step(self, params: list[nn.Parameter], group: dict) -> None:
        """One step of AdamW, all parameters together."""
        first, second = ([self._state(p, name) for p in params] for name in ("moment1", "moment2"))
        steps = [self._state(p, "steps", torch.zeros(())) for p in params]
        grads = [p.grad for p in params]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(first, grads, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, grads, grads, 1 - BETAS[1])
        count = steps[0].item()
        scale = torch._foreach_div(second, 1 - BETAS[1] ** count)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, EPS)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(params, first, scale, -group["lr"] / (1 - BETAS[0] ** count))

    def _state(self, p: nn.Parameter, name: str, start: torch.Tensor | None = None) -> torch.Tensor:
        """The state ``name`` of a parameter, at first ``start`` or zeros."""
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p) if start is None else start
        return state[name]


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About the nearest (semi-)orthogonal matrix of each: [N, m, n] -> [N, m, n], with singular values in about
    0.7..1.2. The quintic Newton-Schulz iteration of the paper, in bf16 on a GPU. Many processors have no arithmetic for
    bf16: there a step of mini's base took four times as long with it."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x.float()
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices)
