"""A transformers model without its weights: every parameter on the meta device, every small table real."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from i2l_ext.encoders.keys import file_key
from i2l_ext.weights.compute import Callbacks, ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.stream import load_weights

Model = TypeVar("Model", bound=nn.Module)

_ALLOCATES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})


class _MetaParameters(TorchFunctionMode):
    """Puts parameters, which modules make by ``torch.empty`` and its like, on the meta device. Rotary and position
    tables, which they make by ``torch.arange``, get their values: they are in no checkpoint.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ALLOCATES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_without_weights(build: Callable[[], Model]) -> Model:
    """``build()`` in evaluation mode, at no cost in memory. Raises RuntimeError where a table has no values."""
    with _MetaParameters():
        model = build().eval().requires_grad_(False)
    unexpected = [name for name, weight in model.named_parameters() if not weight.is_meta]
    empty = [name for name, table in model.named_buffers() if table.is_meta]
    if unexpected or empty:
        raise RuntimeError(f"this version of transformers builds {(unexpected + empty)[0]!r} in a way not known here")
    return model


def structure_of(encoder: str, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{key in the file: shape} of a model's weights."""
    return {file_key(encoder, key): tuple(weight.shape) for key, weight in model.state_dict().items()}


def file_keys(encoder: str, model: nn.Module, part: nn.Module) -> dict[str, str]:
    """{name inside ``part``: key in the file} of the weights of a part of ``model``."""
    prefix = next(name for name, module in model.named_modules() if module is part)
    return {name: file_key(encoder, f"{prefix}.{name}") for name in part.state_dict()}


def load_small_tensors(
    encoder: str,
    model: nn.Module,
    tower: nn.Module,
    parts: Sequence[nn.Module],
    files: TensorFiles,
    options: ComputeOptions,
    callbacks: Callbacks,
) -> int:
    """Load ``parts`` of a tower of ``model`` for good, and put its tables on the device. Returns the bytes of weights
    that are loaded now.

    Tables get the dtype of ``options`` too: the authors' package casts whole models, and the i2L heads were trained
    on its embeddings.
    """
    for part in parts:
        load_weights(files, part, file_keys(encoder, model, part), options, callbacks)
    for module in tower.modules():
        for name, table in module._buffers.items():
            module._buffers[name] = table if table is None else options.place(table)
    return sum(weight.nbytes for weight in model.parameters() if not weight.is_meta)
