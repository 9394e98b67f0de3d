"""From the options of a request to how the engine computes, and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from i2l_ext.models import catalogue
from i2l_ext.operations.context import Context, Reporter
from i2l_ext.requests import EngineOptions, parse_size

if TYPE_CHECKING:
    from i2l_ext.encoders.cache import EmbeddingCache
    from i2l_ext.weights.compute import Callbacks, ComputeOptions


def compute_options(options: EngineOptions) -> ComputeOptions:
    """Device, dtype (torch's name of one, or auto) and memory bound. Raises UserError where there is no such device."""
    from i2l_ext.weights.compute import ComputeOptions
    from i2l_ext.weights.devices import resolve_device, resolve_precision

    memory = parse_size(options.memory) if options.memory else None
    return ComputeOptions(resolve_device(options.device), resolve_precision(options.precision), memory)


def callbacks(reporter: Reporter) -> Callbacks:
    """The reporter, as what computes knows it."""
    from i2l_ext.weights.compute import Callbacks

    return Callbacks(reporter.begin, reporter.progress, reporter.cancelled, reporter.begin_saving)


def embedding_cache(options: EngineOptions) -> EmbeddingCache | None:
    """The encoder cache within its bound; None where nothing is to be kept."""
    from i2l_ext.encoders.cache import EmbeddingCache

    if options.cache_bytes == 0:
        return None
    cache = EmbeddingCache.default()
    return cache if options.cache_bytes is None else replace(cache, limit=options.cache_bytes)


def note_other_dtypes(model: str, options: ComputeOptions, context: Context) -> None:
    """Note each encoder of ``model`` that is not computed in the dtype that was asked for."""
    for line in _other_dtypes(model, options):
        context.reporter.note(line)


def _other_dtypes(model: str, options: ComputeOptions) -> Iterator[str]:
    from i2l_ext.weights.devices import choose_dtype, device_facts

    for encoder in catalogue.find(model).encoders:
        choice = choose_dtype(device_facts(options.device), encoder.spec.safe_dtypes, options.dtype)
        if options.dtype not in ("auto", choice.dtype):
            yield f"{encoder.id} is computed in {choice}."
