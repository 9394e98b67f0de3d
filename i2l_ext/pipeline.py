"""The story on one page: pictures -> embeddings -> LoRA -> file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext import images, library
from i2l_ext.converters import dialects
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.rank import resize
from i2l_ext.converters.select import select
from i2l_ext.library import metadata, names
from i2l_ext.models import catalogue, store
from i2l_ext.weights.compute import DEFAULT_OPTIONS, NO_CALLBACKS, Callbacks, ComputeOptions

if TYPE_CHECKING:
    from i2l_ext.converters.lora import Lora, Pair
    from i2l_ext.embed import Embeddings
    from i2l_ext.encoders.cache import Cache
    from i2l_ext.models.catalogue import Model


@dataclass(frozen=True)
class Order:
    """What the user asks for. ``weights``: one for each picture, by which their updates are averaged; ``strength``
    scales the whole update; ``dtype`` and ``rank`` None: as made."""

    pictures: Sequence[Path]
    name: str
    folder: Path
    model: str = "mini"
    weights: Sequence[float] | None = None
    strength: float = 1.0
    dialect: str = dialects.DEFAULT
    dtype: str | None = None
    rank: int | None = None
    blocks: str | None = None
    kinds: str | None = None
    overwrite: bool = False
    description: str = ""
    activation_text: str = ""
    host: str = ""


@dataclass(frozen=True)
class Made:
    """What came of it; the fields of ``i2l make --json``."""

    file: str
    name: str
    model: str
    arch: str
    dialect: str
    rank: int
    modules: int
    bytes: int
    prompt: str
    preview: str
    sidecar: str
    images: list[dict[str, Any]]
    seconds: dict[str, float]

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """An order whose pictures are open: ``scales`` says how much of the update each of them gives."""

    order: Order
    model: Model
    pictures: Sequence[images.Picture]
    scales: Sequence[float]

    @property
    def origins(self) -> list[dict[str, Any]]:
        """Where the LoRA comes from, without a name of the user's."""
        return [{"sha256": p.sha256, "weight": scale} for p, scale in zip(self.pictures, self.scales, strict=True)]

    @property
    def request(self) -> str:
        """A digest of all that was asked for and decides what the LoRA does, by which a later run knows it as made.

        Name, place and card (description, words for the prompt) are left out: they may be changed by hand since. So
        are device and precision, which change the last digits only.
        """
        order = self.order
        shape = [order.dialect, order.dtype, order.rank, order.blocks, order.kinds]
        facts = [self.model.name, self.origins, float(order.strength), *shape]
        return sha256(json.dumps(facts).encode()).hexdigest()


def make(
    order: Order,
    options: ComputeOptions = DEFAULT_OPTIONS,
    callbacks: Callbacks = NO_CALLBACKS,
    cache: Cache | None = None,
) -> Made:
    """Pictures in, LoRA file out. The steps are ``encode ID`` for each encoder, and ``decode``.

    Raises UserError for what the user can mend, Cancelled when the user wants to stop; then nothing is left behind.
    """
    from i2l_ext.embed import embed

    job = prepare(order)
    weights = store.require(job.model)
    clock = Clock()
    with ExitStack() as opened:
        seen = clock.time("encode", lambda: embed(job.pictures, job.model, weights, options, callbacks, cache))
        callbacks.step("decode")
        parts = decode(job.model, weights, seen, [order.strength * scale for scale in job.scales], callbacks, opened)
        whole = complete(parts, job, weights, opened)
        return save(job, clock.watch("decode", whole, callbacks), clock)


def prepare(order: Order) -> Job:
    """Check what can be checked before the slow part, and open the pictures. Raises UserError."""
    names.check_name(order.name)
    library.check_folder(order.folder)
    model = catalogue.find(order.model)
    paths = images.collect(order.pictures)
    scales = shares(order.weights, len(paths))
    return Job(order, model, [images.open_image(path, sizes=model.views) for path in paths], scales)


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """How much of the update each of ``count`` pictures gives: w_i / sum(w), and for equal weights exactly 1 / N.

    Raises UserError unless there is one positive weight a picture.
    """
    weights = [1.0] * count if weights is None else weights
    if len(weights) != count:
        raise UserError(f"{len(weights)} weights for {count} pictures: give one weight for each picture.")
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError("A picture's weight must be greater than 0. Leave out a picture that is to have no part.")
    if len(set(weights)) == 1:
        return [1 / count] * count
    return [weight / sum(weights) for weight in weights]


def decode(
    model: Model,
    weights: Mapping[str, Sequence[Path]],
    seen: Embeddings,
    scales: Sequence[float],
    callbacks: Callbacks,
    opened: ExitStack,
) -> list[Lora]:
    """Each expert's part of the LoRA, made as it is read, while ``opened`` is open.

    Raises UserError for a checkpoint that is not what it should be.
    """
    from i2l_ext.decoder.decode import Heads

    parts = []
    for expert in model.experts:
        [path] = weights[expert.heads.id]
        heads = opened.enter_context(Heads(path, expert.heads.spec, callbacks))
        parts.append(heads.lora(seen.image, scales, seen.tokens.get(expert.view) if expert.view else None))
    return parts


def complete(parts: Sequence[Lora], job: Job, weights: Mapping[str, Sequence[Path]], opened: ExitStack) -> Lora:
    """The experts' parts side by side and the bias behind them, with the blocks, kinds, rank and dtype as ordered.
    Without an order the dtype is the experts': the bias is a file of its own, and may be an fp8.

    Raises UserError for a bias that is not of the model.
    """
    from i2l_ext.converters.files import TensorFile
    from i2l_ext.converters.lora import concatenate, from_file

    order, model = job.order, job.model
    factors = [1.0] * len(parts)
    made = {spec.dtype for part in parts for spec in part.specs.values()}
    dtype = order.dtype or (made.pop() if len(made) == 1 else "F32")
    if model.bias:
        [path] = weights[model.bias.id]
        bias = from_file(opened.enter_context(TensorFile(path)))
        if bias.arch is not model.arch:
            raise UserError(f"{path.name}: a LoRA of {bias.arch.title}, not of {model.arch.title}.")
        parts, factors = [*parts, bias], [*factors, order.strength]
    lora = concatenate(parts, factors) if len(parts) > 1 else parts[0]
    lora = select(lora, order.blocks, order.kinds)
    if order.rank is not None:
        lora = resize(lora, order.rank)
    return lora.cast(dtype)


def save(job: Job, lora: Lora, clock: Clock) -> Made:
    """The file, its preview and its sidecar. Raises UserError; then nothing is left behind."""
    order, model = job.order, job.model
    facts: dict[str, Any] = {
        "arch_id": model.arch.id,
        "model": model.name,
        "rank": lora.rank,
        "description": order.description,
    }

    def write(part: Path, name: str) -> None:
        made = metadata.metadata(name, **facts, images=job.origins, strength=order.strength, request=job.request)
        lora.write(part, order.dialect, metadata=made)

    sidecar = metadata.sidecar(
        description=order.description,
        sd_version=metadata.sd_version(model.arch.id, order.host),
        activation_text=order.activation_text,
    )
    preview = images.collage([picture.square for picture in job.pictures])
    saved = clock.time(
        "save",
        lambda: library.save(
            order.folder, order.name, write, preview=preview, sidecar=sidecar, overwrite=order.overwrite
        ),
    )
    return Made(
        file=str(saved.file),
        name=saved.name,
        model=model.name,
        arch=model.arch.id,
        dialect=order.dialect,
        rank=lora.rank,
        modules=len(lora),
        bytes=saved.file.stat().st_size,
        prompt=f"<lora:{saved.name}:1>",
        preview=str(saved.preview),
        sidecar=str(saved.sidecar),
        images=job.origins,
        seconds=clock.seconds,
    )


class Clock:
    """Seconds by phase. Decoding happens while the file is written: its time is taken off the writing's."""

    def __init__(self) -> None:
        self.seconds = {"encode": 0.0, "decode": 0.0, "save": 0.0}

    def time(self, phase: str, work: Callable[[], Any]) -> Any:
        start, inner = time.perf_counter(), self.seconds["decode"]
        result = work()
        self.seconds[phase] += time.perf_counter() - start - (self.seconds["decode"] - inner)
        return result

    def watch(self, phase: str, lora: Lora, callbacks: Callbacks) -> Lora:
        """The same LoRA; making its factors is timed, told, and stopped when the user wants it."""
        done: set[str] = set()

        def load(path: str) -> Pair:
            callbacks.check()
            start = time.perf_counter()
            try:
                pair = lora.load(path)
            except OSError as error:  # or it would be taken for one of the file that is being written
                raise UserError(f"The weights cannot be read ({error.strerror or error}).") from error
            self.seconds[phase] += time.perf_counter() - start
            done.add(path)
            callbacks.progress(len(done) / len(lora))
            return pair

        return replace(lora, load=load)
