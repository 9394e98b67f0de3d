"""Runs a model of many equal layers one layer at a time, so that it is never in memory whole.

Each layer's weights are read once, for all pictures. Their memory is used again for the layer after next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from i2l_ext.converters.errors import UserError
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks, ComputeOptions
from i2l_ext.weights.devices import device_facts, free_memory
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.stored import StoredWeights
from i2l_ext.weights.stream import stream, stream_stored

MAX_INSIDE = 256 << 20
"""Bytes of activations inside a layer at most: enough to keep any processor busy."""

OVERHEAD = 512 << 20
"""Bytes set aside, when memory is limited, for what libraries allocate by themselves."""

FREE_SHARE = 0.85
"""How much of a device's free memory is used where no bound was given."""

State = TypeVar("State")


class PictureCost(NamedTuple):
    """Numbers that a picture takes: between two layers, inside one, for the pairs of its tokens where attention holds
    them, and in the result, which is float32."""

    between: int
    inside: int
    pairs: int = 0
    result: int = 0


@dataclass(frozen=True)
class StreamedLayers(Generic[State]):
    """A model's equal layers, and how a batch of pictures goes into them, through one, and out of them.

    ``keys`` has the weights of each layer, ``{parameter: key in the files}``. ``cost`` is that of a picture of a
    batch. ``batched``: whether a layer takes several pictures in one call.
    """

    layers: nn.ModuleList
    keys: Sequence[Mapping[str, str]]
    enter: Callable[[Tensor], State]
    step: Callable[[int, nn.Module, State], State]
    leave: Callable[[State], Tensor]
    cost: Callable[[Tensor], PictureCost]
    batched: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """``ahead``: layers read ahead; ``inside``: bytes of activations inside a layer; ``between``: between layers."""

    ahead: int
    inside: int
    between: int


def plan_memory(
    memory: int | None, layer: int, fixed: int, state: int, peak: int, device: str | None = None
) -> MemoryPlan:
    """Share ``memory`` out over weights and pictures; all sizes in bytes. None: no limit.

    ``layer`` and ``fixed`` are the weights of one layer and of everything else, ``state`` and ``peak`` what one
    picture takes between and inside layers. ``device``: whose free memory it is, where no bound was given. Raises
    UserError when one layer and one picture do not fit.
    """
    if memory is None:
        return MemoryPlan(1, MAX_INSIDE, 1 << 62)
    available = memory - OVERHEAD - fixed
    for ahead in (1, 0):
        left = available - (1 + ahead) * layer - state - peak
        if left >= 0:
            inside = min(MAX_INSIDE, peak + left // 2)
            return MemoryPlan(ahead, inside, available - (1 + ahead) * layer - max(inside, peak))
    least = (OVERHEAD + fixed + layer + state + peak) / 1e9
    if device:
        raise UserError(
            f"{device}: {memory / 1e9:.1f} GB are left for this model, and it needs {least:.1f} GB. Close what else "
            "uses the device, or choose --device cpu."
        )
    raise UserError(f"--memory {memory / 1e9:.1f}GB is too little for this model: it needs {least:.1f}GB.")


@torch.no_grad()
def run_layers(
    files: TensorFiles,
    model: StreamedLayers[State],
    batches: Sequence[Tensor],
    options: ComputeOptions,
    callbacks: Callbacks = NO_CALLBACKS,
    *,
    fixed: int = 0,
) -> list[Tensor]:
    """Send batches of pictures [N, ...] through a model; one result [N, ...] for each, float32 on the CPU.

    All layers are read once for all pictures of all batches. Where ``options.memory`` is too little for all pictures
    between two layers, they are read once for as many as fit. ``fixed``: bytes of weights that are loaded already.
    """
    numbers = [PictureCost(*model.cost(batch)) for batch in batches]
    costs = [_picture_bytes(cost, batch, options) for cost, batch in zip(numbers, batches, strict=True)]
    if torch.device(options.device).type == "cpu":
        layer = max(map(files.nbytes, model.keys))
    else:
        layer = options.torch_dtype.itemsize * max(sum(p.numel() for p in part.parameters()) for part in model.layers)
    kept = sum(batch.nbytes + 4 * cost.result * len(batch) for cost, batch in zip(numbers, batches, strict=True))
    plan = _plan(options, layer, fixed, kept, costs)
    rounds: list[list[tuple[int, Tensor]]] = [[]]
    left = plan.between
    for index, (batch, (between, inside)) in enumerate(zip(batches, costs, strict=True)):
        count = max(1, plan.inside // inside) if model.batched else 1
        for chunk in batch.split(min(count, max(1, plan.between // between))):
            if rounds[-1] and left < between * len(chunk):
                rounds.append([])
                left = plan.between
            rounds[-1].append((index, chunk))
            left -= between * len(chunk)
    results: list[list[Tensor]] = [[] for _ in batches]
    for number, chunks in enumerate(rounds):
        states = [model.enter(options.place(chunk)) for _, chunk in chunks]
        told = callbacks.part(number / len(rounds), (number + 1) / len(rounds))
        _run_round(files, model, states, options, told, plan.ahead)
        for (index, _), state in zip(chunks, states, strict=True):
            results[index].append(model.leave(state).float().cpu())
    return [torch.cat(parts) for parts in results]


def _plan(options: ComputeOptions, layer: int, fixed: int, kept: int, costs: Sequence[tuple[int, int]]) -> MemoryPlan:
    """The plan for pictures of these costs. ``kept``: bytes of all pictures and results; they lie in the computer's
    memory, as what ``options`` say is held does."""
    memory, device = options.memory, None
    if torch.device(options.device).type == "cpu":
        fixed += options.held + kept
    elif memory is None and (free := free_memory(options.device)) is not None:
        memory, device = fixed + int(FREE_SHARE * free), options.device  # what is fixed is not free any more
    state, peak = (max(sizes) for sizes in zip(*costs, strict=True))
    return plan_memory(memory, layer, fixed, state, peak, device)


def _picture_bytes(cost: PictureCost, batch: Tensor, options: ComputeOptions) -> tuple[int, int]:
    """Bytes that a picture of a batch takes between and inside layers. Its pixels are gone once it has entered. Pairs
    of tokens are held as logits and as weights."""
    pairs = 2 * cost.pairs * device_facts(options.device).attends_by_squares(options.dtype)
    inside = max(cost.inside + pairs, math.prod(batch.shape[1:]))
    return options.torch_dtype.itemsize * cost.between, options.torch_dtype.itemsize * inside


def _run_round(
    files: TensorFiles,
    model: StreamedLayers[State],
    states: list[State],
    options: ComputeOptions,
    callbacks: Callbacks,
    ahead: int,
) -> None:
    """Take every state through every layer, in place. A layer has its weights only while it is in use."""
    steps = len(model.layers) * len(states)
    with closing(_with_weights(files, model, options, callbacks, ahead)) as layers:
        for index, layer in enumerate(layers):
            # a matrix product is the longest step that cannot be interrupted
            hooks = [
                module.register_forward_pre_hook(lambda *_: callbacks.check())
                for module in layer.modules()
                if isinstance(module, nn.Linear)
            ]
            for number, state in enumerate(states):
                callbacks.check()
                states[number] = model.step(index, layer, state)
                callbacks.progress((index * len(states) + number + 1) / steps)
            for hook in hooks:
                hook.remove()


def _with_weights(
    files: TensorFiles, model: StreamedLayers[State], options: ComputeOptions, callbacks: Callbacks, ahead: int
) -> Generator[nn.Module, None, None]:
    """Each layer, as long as it has its weights."""
    if torch.device(options.device).type == "cpu":
        own = closing(StoredWeights(options.torch_dtype))
        with own as given, closing(stream_stored(files, model.keys, callbacks, ahead=ahead)) as groups:
            for layer, stored in zip(model.layers, groups, strict=True):
                with given.given_to(layer, stored):
                    yield layer
        return
    with closing(stream(files, model.keys, options, callbacks, ahead=ahead)) as weights:
        for layer, tensors in zip(model.layers, weights, strict=True):
            layer.load_state_dict(tensors, assign=True)
            yield layer
            layer.to("meta")


def hidden_states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states of a layer's output: some versions of transformers return them in a tuple."""
    return output[0] if isinstance(output, tuple) else output
