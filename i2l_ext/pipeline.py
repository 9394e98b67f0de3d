"""The story on one page: pictures -> embeddings -> LoRA -> file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext import images, labels, library, names
from i2l_ext.checkpoints import catalogue, store
from i2l_ext.converters import dialects
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.select import select

if TYPE_CHECKING:
    from i2l_ext.checkpoints.catalogue import Model
    from i2l_ext.checkpoints.embeddings import Cache
    from i2l_ext.checkpoints.stream import Run
    from i2l_ext.converters.lora import Lora, Pair
    from i2l_ext.embed import Embeddings


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


def make(order: Order, run: Callable[[str], Run], cache: Cache | None = None) -> Made:
    """Pictures in, LoRA file out. ``run`` gives, by the title of a step, how to compute it and whom to tell.

    Raises UserError for what the user can mend, Cancelled when the run says so; then nothing is left behind.
    """
    names.check_name(order.name)
    model = catalogue.find(order.model)
    weights = store.require(model)
    pictures = [images.open_image(path, sizes=model.views) for path in images.collect(order.pictures)]
    scales = shares(order.weights, len(pictures))

    clock = _Clock()
    with ExitStack() as opened:
        seen = clock.time("encode", lambda: _embed(pictures, model, weights, run, cache))
        made = decode(model, weights, seen, [order.strength * scale for scale in scales], order.strength, opened)
        lora = adjust(clock.watch("decode", made, run("decode")), order)
        saved = clock.time("save", lambda: _save(order, model, lora, pictures, scales))
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
        images=_origins(pictures, scales),
        seconds=clock.seconds,
    )


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


def _embed(
    pictures: Sequence[images.Picture],
    model: Model,
    weights: Mapping[str, Sequence[Path]],
    run: Callable[[str], Run],
    cache: Cache | None,
) -> Embeddings:
    from i2l_ext.embed import embed

    return embed(pictures, model, weights, run, cache)


def decode(
    model: Model,
    weights: Mapping[str, Sequence[Path]],
    seen: Embeddings,
    scales: Sequence[float],
    strength: float,
    opened: ExitStack,
) -> Lora:
    """All experts' parts side by side, and the bias behind them; computed when it is read, while ``opened`` is open.

    Raises UserError for a checkpoint that is not what it should be.
    """
    from i2l_ext import decoder
    from i2l_ext.checkpoints.structure import check_structure
    from i2l_ext.converters.files import TensorFile
    from i2l_ext.converters.lora import concatenate, from_file

    parts, factors = [], []
    for expert in model.experts:
        [path] = weights[expert.heads.id]
        file = opened.enter_context(TensorFile(path))
        check_structure(path.name, expert.heads.shapes, file.header.shapes)
        residual = seen.tokens.get(expert.view) if expert.view else None
        parts.append(decoder.decode(file, expert.heads.spec, seen.image, scales, residual))
        factors.append(1.0)
    if model.bias:
        [path] = weights[model.bias.id]
        bias = from_file(opened.enter_context(TensorFile(path)))
        if bias.arch is not model.arch:
            raise UserError(f"{path.name}: a LoRA of {bias.arch.title}, not of {model.arch.title}.")
        parts.append(bias)
        factors.append(strength)
    return concatenate(parts, factors) if len(parts) > 1 else parts[0]


def adjust(lora: Lora, order: Order) -> Lora:
    """Blocks and kinds, rank and dtype as the user wants them."""
    lora = select(lora, order.blocks, order.kinds)
    return lora if order.dtype is None else lora.cast(order.dtype)


def _save(
    order: Order, model: Model, lora: Lora, pictures: Sequence[images.Picture], scales: Sequence[float]
) -> library.Saved:
    origins = _origins(pictures, scales)
    arch, said = model.arch.id, {"description": order.description}

    def write(part: Path, name: str) -> None:
        facts = {"arch_id": arch, "model": model.name, "rank": lora.rank, "images": origins, "strength": order.strength}
        lora.write(part, order.dialect, metadata=labels.metadata(name, **facts, **said))

    version = labels.sd_version(arch, order.host)
    return library.save(
        order.folder,
        order.name,
        write,
        preview=images.collage([picture.square for picture in pictures]),
        sidecar=labels.sidecar(**said, sd_version=version, activation_text=order.activation_text),
        overwrite=order.overwrite,
    )


def _origins(pictures: Sequence[images.Picture], scales: Sequence[float]) -> list[dict[str, Any]]:
    return [{"sha256": p.sha256, "weight": scale} for p, scale in zip(pictures, scales, strict=True)]


class _Clock:
    """Seconds by phase. Decoding happens while the file is written: its time is taken off the writing's."""

    def __init__(self) -> None:
        self.seconds = {"encode": 0.0, "decode": 0.0, "save": 0.0}

    def time(self, phase: str, work: Callable[[], Any]) -> Any:
        start, inner = time.perf_counter(), self.seconds["decode"]
        result = work()
        self.seconds[phase] += time.perf_counter() - start - (self.seconds["decode"] - inner)
        return result

    def watch(self, phase: str, lora: Lora, run: Run) -> Lora:
        """The same LoRA; making its factors is timed, told to the run, and stopped when the run says so."""
        done: set[str] = set()

        def load(path: str) -> Pair:
            run.check()
            start = time.perf_counter()
            pair = lora.load(path)
            self.seconds[phase] += time.perf_counter() - start
            done.add(path)
            run.progress(len(done) / len(lora))
            return pair

        return replace(lora, load=load)
