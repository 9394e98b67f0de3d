"""Many LoRAs in one go: one for each picture or sub-folder, the models walked once for many of them.

A batch can be stopped at any time and started again: what is made already is left out. Under ``accelerate launch``
every process takes its share, each order going to one process; the share of a process that died is left undone, and
so is taken up when the same command runs again.
"""

from __future__ import annotations

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
from i2l_ext.models import catalogue, store
from i2l_ext.pipeline import Clock, Job, Made, Order, complete, decode, prepare, save
from i2l_ext.weights.compute import DEFAULT_OPTIONS, NO_CALLBACKS, Callbacks, ComputeOptions

if TYPE_CHECKING:
    from i2l_ext.converters.inspection import Inspection
    from i2l_ext.converters.lora import Lora, Pair
    from i2l_ext.embed import Embeddings
    from i2l_ext.encoders.cache import Cache
    from i2l_ext.models.catalogue import Model

AT_ONCE = 64
"""Orders whose pictures go through the encoders together: 3 MB of memory a picture, and what a stop can cost."""

TOGETHER = 16
"""Pictures whose factors are held at once: 59 MB each for Qwen-Image. Every head is read once for all of them."""


@dataclass(frozen=True)
class LeftOut:
    """An order that came to nothing: ``done`` where it had been made before, else ``reason``."""

    name: str
    reason: str
    done: bool = False


def each(paths: Sequence[Path], template: Order) -> list[Order]:
    """An order for every picture and for every sub-folder with pictures. Raises UserError.

    Names are those of the files and folders, made fit; where two come out equal the later one gets a number, always
    the same one, as everything is in the order of names.
    """
    orders: list[Order] = []
    taken: set[str] = set()
    for source in _sources(paths):
        name = stem = names.suggest_name([source])
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        orders.append(replace(template, pictures=[source], name=name))
    if not orders:
        raise UserError("No pictures found, neither in the folder nor in its sub-folders.")
    return orders


def _sources(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for inside in sorted(path.iterdir()):
            if inside.is_dir():
                if any(file.suffix.lower() in images.SUFFIXES for file in inside.iterdir()):
                    yield inside
            elif inside.suffix.lower() in images.SUFFIXES and not inside.name.startswith("."):
                yield inside


def share(orders: Sequence[Order], environment: Mapping[str, str] = os.environ) -> list[Order]:
    """This process's part, by the variables RANK and WORLD_SIZE that ``accelerate launch`` and torchrun set."""
    return list(orders[int(environment.get("RANK", 0)) :: int(environment.get("WORLD_SIZE", 1))])


def make_each(
    orders: Sequence[Order],
    options: ComputeOptions = DEFAULT_OPTIONS,
    callbacks: Callbacks = NO_CALLBACKS,
    cache: Cache | None = None,
) -> Iterator[Made | LeftOut]:
    """Make what is not made yet. One order that fails, because of its picture say, does not stop the others.

    All orders are for one model. Raises UserError for what fails for all, Cancelled when the user wants to stop.
    """
    weights = store.require(_model_of(orders))
    rest = iter(orders)
    while some := list(islice(rest, AT_ONCE)):
        jobs: list[Job] = []
        for order in some:
            try:
                job = prepare(order)
            except UserError as error:
                yield LeftOut(order.name, str(error))
                continue
            before = _made_before(job)
            if before is not None:
                yield before
            else:
                jobs.append(job)
        if jobs:
            yield from _make_some(jobs, weights, options, callbacks, cache)


def _model_of(orders: Sequence[Order]) -> Model:
    """The one model of all orders. Raises UserError where it is unknown."""
    [name] = {order.model for order in orders}
    return catalogue.find(name)


def _made_before(job: Job) -> LeftOut | None:
    """Whether a LoRA of that name lies there: the very one, or another that we shall not touch."""
    name, file = job.order.name, job.order.folder / f"{job.order.name}.safetensors"
    if job.order.overwrite or not file.exists():
        return None
    with suppress(UserError):
        found = inspect(file, values=False)
        request = found.metadata.get("i2l.request")
        if request == job.request:
            return LeftOut(name, "made before", done=True)
        if request is None and _tells_the_same(found, job):
            return LeftOut(name, "made before, as far as the file tells: it does not say with which options", done=True)
    reason = f"{file.name} is another LoRA, or made with other options. Move it away, or say --overwrite."
    return LeftOut(name, reason)


def _tells_the_same(found: Inspection, job: Job) -> bool:
    """For a file without the digest of its request, from before there was one or changed since. No file tells from
    which blocks and kinds it was chosen."""
    order = job.order
    wanted = {"i2l.model": job.model.name, "i2l.strength": f"{order.strength:g}", "i2l.images": json.dumps(job.origins)}
    return (
        wanted.items() <= found.metadata.items()
        and found.dialect == order.dialect
        and (order.dtype is None or set(found.dtypes) == {order.dtype})
        and (order.rank is None or set(found.ranks) == {order.rank})
        and order.blocks is order.kinds is None
    )


def _make_some(
    jobs: Sequence[Job],
    weights: Mapping[str, Sequence[Path]],
    options: ComputeOptions,
    callbacks: Callbacks,
    cache: Cache | None,
) -> Iterator[Made | LeftOut]:
    from i2l_ext.embed import embed

    model, clock = jobs[0].model, Clock()
    pictures = [picture for job in jobs for picture in job.pictures]
    seen = clock.time("encode", lambda: embed(pictures, model, weights, options, callbacks, cache))
    for group, start, stop in _groups(jobs):
        with ExitStack() as opened:
            scales = [job.order.strength * scale for job in group for scale in job.scales]
            callbacks.step("decode")
            parts = decode(model, weights, _rows(seen, start, stop), scales, callbacks, opened)
            held = [_held(clock.watch("decode", part, callbacks)) for part in parts]
            at = 0
            for job in group:
                count = len(job.pictures)
                own = [_of_pictures(part, at, count, len(scales)) for part in held]
                at += count
                try:
                    yield save(job, complete(own, job, weights, opened), _share_of(clock, count / len(scales)))
                except UserError as error:
                    yield LeftOut(job.order.name, str(error))


def _groups(jobs: Sequence[Job]) -> Iterator[tuple[list[Job], int, int]]:
    """Jobs of at most TOGETHER pictures (or a single larger one), with where their pictures start and stop."""
    group: list[Job] = []
    start = stop = 0
    for job in jobs:
        if group and stop - start + len(job.pictures) > TOGETHER:
            yield group, start, stop
            group, start = [], stop
        group.append(job)
        stop += len(job.pictures)
    yield group, start, stop


def _rows(seen: Embeddings, start: int, stop: int) -> Embeddings:
    return replace(
        seen, image=seen.image[start:stop], tokens={side: rows[start:stop] for side, rows in seen.tokens.items()}
    )


def _held(lora: Lora) -> Lora:
    """The same, all of its factors made and in memory."""
    return replace(lora, load={path: lora[path] for path in lora}.__getitem__)


def _of_pictures(lora: Lora, first: int, count: int, total: int) -> Lora:
    """The ranks that some of ``total`` pictures gave."""
    from i2l_ext.converters.lora import FactorSpec

    specs = {path: FactorSpec(spec.rank // total * count, spec.dtype) for path, spec in lora.specs.items()}

    def load(path: str) -> Pair:
        down, up = lora[path]
        rank = down.shape[0] // total
        rows = slice(first * rank, (first + count) * rank)
        return down[rows], up[:, rows]

    return replace(lora, specs=specs, load=load)


def _share_of(clock: Clock, part: float) -> Clock:
    """A clock for one of several LoRAs: of what was done for all it bears its part."""
    own = Clock()
    own.seconds = {phase: seconds * part for phase, seconds in clock.seconds.items()}
    return own
