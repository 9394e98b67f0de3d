"""Many LoRAs in one go: one for each picture or sub-folder. The models are read once for many of them.

A batch can be stopped at any time and started again: what is made already is skipped. Under ``accelerate launch``
every process takes its share of the requests. The share of a process that died is made when the same command runs
again.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext import images
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.inspection import inspect
from i2l_ext.library import names
from i2l_ext.models import store
from i2l_ext.models.heads import requested_model
from i2l_ext.pipeline import MakeResult, PhaseClock, PreparedMake, finish, open_parts, prepare, save_result
from i2l_ext.weights.compute import DEFAULT_OPTIONS, NO_CALLBACKS, Callbacks, ComputeOptions

if TYPE_CHECKING:
    from i2l_ext.converters.inspection import Inspection
    from i2l_ext.converters.lora import Lora, Pair
    from i2l_ext.encoders.cache import EmbeddingCache
    from i2l_ext.requests import MakeRequest

ENCODED_TOGETHER = 64
"""Requests whose pictures are encoded together: 3 MB of memory a picture, and at most this much is lost by a stop."""

DECODED_TOGETHER = 16
"""Pictures whose factors are in memory at once: 59 MB each for Qwen-Image. Every head is read once for all of them."""


@dataclass(frozen=True)
class SkippedMake:
    """A request for which nothing was made. ``done``: it had been made before. ``reason``: why, for the user."""

    name: str
    reason: str
    done: bool = False


def requests_of(paths: Sequence[Path], template: MakeRequest) -> list[MakeRequest]:
    """A request for every picture and for every sub-folder with pictures. Raises UserError where there are none.

    Names are those of the files and folders, as far as hosts take them. Where two come out equal the later one gets a
    number, always the same, since the order is by name.
    """
    requests: list[MakeRequest] = []
    taken: set[str] = set()
    for source in _sources(paths):
        stem = names.suggest_name([source])
        numbered = (names.with_number(stem, number) for number in itertools.count(1))
        name = next(name for name in numbered if name.lower() not in taken)
        taken.add(name.lower())
        requests.append(replace(template, pictures=(source,), name=name))
    if not requests:
        raise UserError("No pictures found, neither in the folder nor in its sub-folders.")
    return requests


def _sources(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for inside in sorted(path.iterdir()):
            if inside.is_dir():
                if any(file.suffix.lower() in images.suffixes() for file in inside.iterdir()):
                    yield inside
            elif inside.suffix.lower() in images.suffixes() and not inside.name.startswith("."):
                yield inside


def share_of_process(requests: Sequence[MakeRequest], environment: Mapping[str, str] = os.environ) -> list[MakeRequest]:
    """This process's share, by the variables RANK and WORLD_SIZE that ``accelerate launch`` and torchrun set."""
    return list(requests[int(environment.get("RANK", 0)) :: int(environment.get("WORLD_SIZE", 1))])


def make_each(
    requests: Sequence[MakeRequest],
    options: ComputeOptions = DEFAULT_OPTIONS,
    callbacks: Callbacks = NO_CALLBACKS,
    cache: EmbeddingCache | None = None,
) -> Iterator[MakeResult | SkippedMake]:
    """Make what is not made yet. A request that fails, because of its picture say, does not stop the others.

    All requests are for the model of the first. Raises UserError for what fails for all, Cancelled when the user wants
    to stop.
    """
    files = store.require(requested_model(requests[0]))
    rest = iter(requests)
    while some := list(islice(rest, ENCODED_TOGETHER)):
        prepared: list[PreparedMake] = []
        for request in some:
            try:
                one = prepare(request)
            except UserError as error:
                yield SkippedMake(request.name or "", str(error))
                continue
            skipped = _made_before(one)
            if skipped is not None:
                yield skipped
            else:
                prepared.append(one)
        if prepared:
            yield from _make_together(prepared, files, options, callbacks, cache)


def _made_before(prepared: PreparedMake) -> SkippedMake | None:
    """Whether there is a LoRA of that name: the same one, or another, which is never overwritten unasked."""
    name, file = prepared.name, prepared.folder / f"{prepared.name}.safetensors"
    if prepared.request.overwrite or not file.exists():
        return None
    with suppress(UserError):
        found = inspect(file, values=False)
        digest = found.metadata.get("i2l.request")
        if digest == prepared.digest:
            return SkippedMake(name, "made before", done=True)
        if digest is None and _matches(found, prepared):
            reason = "made before, as far as the file tells: it does not say with which options"
            return SkippedMake(name, reason, done=True)
    reason = f"{file.name} is another LoRA, or made with other options. Move it away, or say --overwrite."
    return SkippedMake(name, reason)


def _matches(found: Inspection, prepared: PreparedMake) -> bool:
    """Whether a file without a digest of its request was made by this one, as far as it tells. Files from before there
    was a digest have none, and converted ones. No file tells which blocks and kinds were kept."""
    request = prepared.request
    wanted = {
        "i2l.model": prepared.model.name,
        "i2l.strength": f"{request.strength:g}",
        "i2l.images": json.dumps(prepared.origins),
    }
    return (
        wanted.items() <= found.metadata.items()
        and found.reading.key_format == prepared.key_format
        and (prepared.dtype is None or set(found.dtypes) == {prepared.dtype})
        and (request.rank is None or set(found.ranks) == {request.rank})
        and request.blocks is request.kinds is None
    )


def _make_together(
    prepared: Sequence[PreparedMake],
    files: Mapping[str, Sequence[Path]],
    options: ComputeOptions,
    callbacks: Callbacks,
    cache: EmbeddingCache | None,
) -> Iterator[MakeResult | SkippedMake]:
    from i2l_ext.embed import embed

    model, clock = prepared[0].model, PhaseClock()
    pictures = [picture for one in prepared for picture in one.pictures]
    with clock.phase("encode"):
        embeddings = embed(pictures, model, files, options, callbacks, cache)
    for group, start, stop in _groups(prepared, 0 if model.sees_together else DECODED_TOGETHER):
        with ExitStack() as opened:
            scales = [scale for one in group for scale in one.scales]
            callbacks.step("decode")
            parts = open_parts(model, files, embeddings.rows(start, stop), scales, callbacks, opened)
            parts = [_in_memory(clock.watch(part, callbacks)) for part in parts]
            first = 0
            for one in group:
                count = len(one.pictures)
                own = [_of_pictures(part, first, count, len(scales)) for part in parts]
                first += count
                try:
                    lora = finish(own, one, files, opened)
                    yield save_result(one, lora, clock.portion(count / len(scales)), callbacks)
                except UserError as error:
                    yield SkippedMake(one.name, str(error))


def _groups(prepared: Sequence[PreparedMake], most: int) -> Iterator[tuple[list[PreparedMake], int, int]]:
    """Groups of at most ``most`` pictures (or a single larger request), and where their pictures start and stop."""
    group: list[PreparedMake] = []
    start = stop = 0
    for one in prepared:
        if group and stop - start + len(one.pictures) > most:
            yield group, start, stop
            group, start = [], stop
        group.append(one)
        stop += len(one.pictures)
    yield group, start, stop


def _in_memory(lora: Lora) -> Lora:
    """The same, with all factors made."""
    return replace(lora, load={path: lora[path] for path in lora}.__getitem__)


def _of_pictures(lora: Lora, first: int, count: int, total: int) -> Lora:
    """The ranks that ``count`` of ``total`` pictures gave, from number ``first`` on."""
    from i2l_ext.converters.lora import FactorSpec

    if count == total:
        return lora
    specs = {path: FactorSpec(spec.rank // total * count, spec.dtype) for path, spec in lora.specs.items()}

    def load(path: str) -> Pair:
        down, up = lora[path]
        rank = down.shape[0] // total
        rows = slice(first * rank, (first + count) * rank)
        return down[rows], up[:, rows]

    return replace(lora, specs=specs, load=load)
