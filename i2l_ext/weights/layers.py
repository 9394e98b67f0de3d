"""A model of many equal layers is walked one layer at a time, so that it never lies in memory whole.

Each layer's weights are read once, for all pictures, and let go before the next but one is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from i2l_ext.converters.errors import UserError
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks, ComputeOptions
from i2l_ext.weights.stream import TensorFiles, stream

WORK = 256 << 20
"""Bytes that pictures may take inside one layer: enough to keep any processor busy."""

OVERHEAD = 512 << 20
"""Bytes set aside, when memory is bounded, for what libraries allocate behind our back."""

State = TypeVar("State")


@dataclass(frozen=True)
class Stack(Generic[State]):
    """A model's equal layers, how a batch of pictures goes into them, through one, and out of them.

    ``names`` has the weights of each layer, ``{parameter: key in the files}``. ``cost`` tells how many numbers a
    picture of a batch takes between two layers, and how many inside one.
    """

    layers: nn.ModuleList
    names: Sequence[Mapping[str, str]]
    enter: Callable[[Tensor], State]
    step: Callable[[int, nn.Module, State], State]
    leave: Callable[[State], Tensor]
    cost: Callable[[Tensor], tuple[int, int]]
    together: bool = True
    """Whether a layer takes several pictures in one call."""


@dataclass(frozen=True)
class Plan:
    """How the pictures go: ``ahead`` layers read ahead; bytes inside a layer; bytes between layers."""

    ahead: int
    inside: int
    between: int


def plan(memory: int | None, layer: int, fixed: int, state: int, peak: int) -> Plan:
    """Share ``memory`` out over weights and pictures; all sizes in bytes. None: no limit.

    ``layer`` and ``fixed`` are the weights of one layer and of everything else, ``state`` and ``peak`` what one
    picture takes between and inside layers. Raises UserError when one layer and one picture do not fit.
    """
    if memory is None:
        return Plan(1, WORK, 1 << 62)
    room = memory - OVERHEAD - fixed
    for ahead in (1, 0):
        left = room - (1 + ahead) * layer - state - peak
        if left >= 0:
            inside = min(WORK, peak + left // 2)
            return Plan(ahead, inside, room - (1 + ahead) * layer - max(inside, peak))
    least = (OVERHEAD + fixed + layer + state + peak) / 1e9
    raise UserError(f"--memory {memory / 1e9:.1f}GB is too little for this model: it needs {least:.1f}GB.")


@torch.no_grad()
def run_through(
    files: TensorFiles,
    stack: Stack[State],
    batches: Sequence[Tensor],
    options: ComputeOptions,
    callbacks: Callbacks = NO_CALLBACKS,
    *,
    fixed: int = 0,
) -> list[Tensor]:
    """Send batches of pictures [N, ...] through a stack; one result [N, ...] for each, float32 on the CPU.

    The layers are walked once for all pictures of all batches, unless ``options.memory`` is too little to keep them all
    between two layers; then once for as many as fit. ``fixed`` counts the bytes of weights loaded already.
    """
    size = options.torch_dtype.itemsize
    costs = [tuple(size * numbers for numbers in stack.cost(batch)) for batch in batches]
    layer = size * max(sum(p.numel() for p in layer.parameters()) for layer in stack.layers)
    shares = plan(options.memory, layer, fixed, max(c[0] for c in costs), max(c[1] for c in costs))
    rounds: list[list[tuple[int, Tensor]]] = [[]]
    room = shares.between
    for index, (batch, (state, peak)) in enumerate(zip(batches, costs, strict=True)):
        count = max(1, shares.inside // peak) if stack.together else 1
        for chunk in batch.split(min(count, max(1, shares.between // state))):
            if rounds[-1] and room < state * len(chunk):
                rounds.append([])
                room = shares.between
            rounds[-1].append((index, chunk))
            room -= state * len(chunk)
    results: list[list[Tensor]] = [[] for _ in batches]
    for number, chunks in enumerate(rounds):
        states = [stack.enter(options.place(chunk)) for _, chunk in chunks]
        told = callbacks.part(number / len(rounds), (number + 1) / len(rounds))
        walk(files, stack, states, options, told, shares.ahead)
        for (index, _), state in zip(chunks, states, strict=True):
            results[index].append(stack.leave(state).float().cpu())
    return [torch.cat(parts) for parts in results]


def walk(
    files: TensorFiles,
    stack: Stack[State],
    states: list[State],
    options: ComputeOptions,
    callbacks: Callbacks,
    ahead: int,
) -> None:
    """Take every state through every layer, in place; a layer has its weights only while it is at work."""
    steps = len(stack.layers) * len(states)
    with closing(stream(files, stack.names, options, callbacks, ahead=ahead)) as weights:
        for index, (layer, tensors) in enumerate(zip(stack.layers, weights, strict=True)):
            layer.load_state_dict(tensors, assign=True)
            # a matrix product is the longest that nobody can stop
            hooks = [
                module.register_forward_pre_hook(lambda *_: callbacks.check())
                for module in layer.modules()
                if isinstance(module, nn.Linear)
            ]
            for number, state in enumerate(states):
                callbacks.check()
                states[number] = stack.step(index, layer, state)
                callbacks.progress((index * len(states) + number + 1) / steps)
            for hook in hooks:
                hook.remove()
            layer.to("meta")


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A layer's hidden states: some versions of transformers return them in a tuple."""
    return output[0] if isinstance(output, tuple) else output
