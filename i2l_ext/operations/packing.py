"""Packing the model files of a model, and how far that moves what it makes of a user's own pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext import requests
from i2l_ext.converters.errors import UserError
from i2l_ext.models import catalogue
from i2l_ext.operations.compute import callbacks, compute_options
from i2l_ext.operations.context import Context, Step
from i2l_ext.operations.models import byte_callbacks

if TYPE_CHECKING:
    import torch

    from i2l_ext.converters.lora import Lora
    from i2l_ext.models.catalogue import Checkpoint, I2LModel


@dataclass(frozen=True)
class PackedPart:
    """A checkpoint that was packed, or was packed before: its files, their bytes, and the unpacked ones that were
    downloaded and are still here, with theirs."""

    id: str
    files: Sequence[str]
    bytes: int
    unpacked: Sequence[str]
    unpacked_bytes: int


@dataclass(frozen=True)
class PackingError:
    """How far packed files move what a model makes of some pictures, against the unpacked ones: as shares of the size
    (Frobenius norm) of each embedding, by encoder, and of the update, without a bias."""

    pictures: int
    embeddings: Mapping[str, float]
    update: float


@dataclass(frozen=True)
class PackResult:
    """What was packed, and with ``verify`` what it moves."""

    model: str
    form: str
    parts: Sequence[PackedPart]
    moved: PackingError | None = None

    def json(self) -> dict[str, Any]:
        found = asdict(self)
        return found if self.moved else {name: one for name, one in found.items() if name != "moved"}


def pack_model(request: requests.PackRequest, context: Context) -> PackResult:
    """Pack the files of a model, as far as they are not packed yet. Unpacked files stay where they are.

    Raises UserError, with the code ``weights_missing`` where there is nothing to pack; Cancelled. What was packed until
    then is used by the next run.
    """
    from i2l_ext.models.pack import PACKED_KINDS, pack_files
    from i2l_ext.models.store import Folders, locate, remember

    model, folders = catalogue.find(request.model), Folders.default()
    parts = [part for part in model.parts if part.kind in PACKED_KINDS]
    if not parts:
        raise UserError(f"{model.name}: runs through DiffSynth-Studio, which reads no packed files.")
    plain = {part.id: locate(part, folders, ("",)) for part in parts}
    done = {part.id: locate(part, folders, (request.form,)) for part in parts}
    lacking = [part for part in parts if not done[part.id] and not plain[part.id]]
    if lacking or (request.verify and not all(plain.values())):
        absent = ", ".join(part.id for part in lacking or parts if not plain[part.id])
        advice = f"To fetch and pack them in one go: i2l models download {model.name} --packed."
        use = "comparing" if not lacking else "packing"
        raise UserError(f"{model.name}: for {use} the unpacked files of {absent} are needed. {advice}",
                        "weights_missing")  # fmt: skip
    todo = [part for part in parts if not done[part.id]]
    context.reporter.plan([Step(f"pack {part.id}", f"pack {part.id}", part.nbytes) for part in todo])
    remember(folders.own)
    for part in todo:
        paths = plain[part.id] or []
        done[part.id] = pack_files(part, paths, folders.own, request.form, byte_callbacks(context.reporter))
    packed = [_packed(part, done[part.id] or [], (part.repo and plain[part.id]) or []) for part in parts]
    moved = None
    if request.verify:
        unpacked = {id: paths for id, paths in plain.items() if paths}
        moved = packing_error(
            model, unpacked, {id: paths for id, paths in done.items() if paths}, request.verify, context
        )
    return PackResult(model.name, request.form, packed, moved)


def _packed(part: Checkpoint, packed: Sequence[Path], plain: Sequence[Path]) -> PackedPart:
    sizes = [sum(path.stat().st_size for path in paths) for paths in (packed, plain)]
    return PackedPart(part.id, [*map(str, packed)], sizes[0], [*map(str, plain)], sizes[1])


def packing_error(
    model: I2LModel,
    plain: Mapping[str, Sequence[Path]],
    packed: Mapping[str, Sequence[Path]],
    pictures: Sequence[Path],
    context: Context,
) -> PackingError:
    """Embed the pictures and decode the LoRA with both sets of files, by the checkpoints' ids; nothing is cached or
    saved. Raises UserError, Cancelled."""
    import torch

    from i2l_ext import images, pipeline
    from i2l_ext.embed import embed

    paths = images.collect(pictures)
    opened_pictures = [images.open_image(path, sizes=model.views) for path in paths]
    options, told = compute_options(context.options), callbacks(context.reporter)
    steps = [Step(f"encode {part.id}", f"encode {part.id}", part.nbytes) for part in model.encoders]
    scales = [1 / len(paths)] * len(paths)
    with ExitStack() as opened:
        found = []
        for files in (plain, packed):
            context.reporter.plan([*steps, Step("decode", "decode")])
            embeddings = embed(opened_pictures, model, files, options, told)
            found.append((embeddings, pipeline.open_parts(model, files, embeddings, scales, told, opened)))
        (exact, parts), (moved, moved_parts) = found
        widths = [part.spec.width for part in (model.siglip2, model.dinov3) if part]
        names = [part.id for part in (model.siglip2, model.dinov3) if part]
        pairs = zip(names, exact.image.split(widths, -1), moved.image.split(widths, -1), strict=True)
        shares = {name: relative_difference(one, other) for name, one, other in pairs}
        if model.qwen_vl:
            both = ([*map(torch.flatten, one.tokens.values())] for one in (exact, moved))
            shares[model.qwen_vl.id] = relative_difference(*map(torch.cat, both))
        context.reporter.begin("decode")
        update = update_difference(parts, moved_parts)
    return PackingError(len(paths), shares, update)


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far apart two tensors are, as a share of the size (Frobenius norm) of ``one``."""
    return float((other - one).norm() / one.norm())


def update_difference(ones: Sequence[Lora], others: Sequence[Lora]) -> float:
    """The same of the updates of two LoRAs of the same modules, over all modules together. Each may come in parts that
    are to be added."""
    import torch

    apart = whole = 0.0
    for path in ones[0]:
        pairs = [[tuple(factor.double() for factor in lora[path]) for lora in loras] for loras in (ones, others)]
        (downs, ups), (other_downs, other_ups) = (zip(*parts, strict=True) for parts in pairs)
        whole += _square(torch.cat(downs), torch.cat(ups, 1))
        apart += _square(torch.cat([*downs, *(-down for down in other_downs)]), torch.cat([*ups, *other_ups], 1))
    return (apart / whole) ** 0.5 if whole else 0.0


def _square(down: torch.Tensor, up: torch.Tensor) -> float:
    """The squared Frobenius norm of up @ down, without that product."""
    return max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)
