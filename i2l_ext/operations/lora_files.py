"""What is made of LoRA files: convert, rank, merge, export, repair.

Heavy imports are made where they are needed: to inspect a header takes a tenth of torch's import.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext import requests
from i2l_ext.converters.errors import UserError, one_line
from i2l_ext.converters.key_formats import KEY_FORMATS
from i2l_ext.operations.context import Context
from i2l_ext.operations.lora_reports import check_lora, repair_of, step_progress
from i2l_ext.requests import DTYPES

if TYPE_CHECKING:
    from i2l_ext.converters import Lora
    from i2l_ext.converters.architectures import Architecture
    from i2l_ext.converters.rank import Resizer
    from i2l_ext.converters.start_folder import StartFolder


@dataclass(frozen=True)
class WriteResult:
    """A LoRA file that was written. ``kept``: where its rank was reset, the share of the effect kept, by kind.
    ``lost``: where its dtype has few exponents, the share of the update that this lost; ``loss``: a line about it, if
    it is worth telling."""

    file: Path
    arch: Architecture
    key_format: str
    rank: int
    uniform: bool
    modules: int
    dtype: str
    bytes: int
    kept: Mapping[str, float] | None = None
    lost: float | None = None
    loss: str | None = None

    def json(self) -> dict[str, Any]:
        told = {
            "file": str(self.file), "arch": self.arch.id, "key_format": self.key_format, "rank": self.rank,
            "modules": self.modules, "dtype": self.dtype, "bytes": self.bytes,
        }  # fmt: skip
        measured = {"kept": self.kept, "lost": self.lost, "loss": self.loss}
        return told | {name: value for name, value in measured.items() if value is not None}


@dataclass(frozen=True)
class ExportResult:
    """A start folder that was written."""

    written: StartFolder

    def json(self) -> dict[str, Any]:
        return self.written.json()


@dataclass(frozen=True)
class RepairResult:
    """What a repair wrote: by which command, and where."""

    command: str
    consumer: str
    file: Path
    result: WriteResult | ExportResult

    def json(self) -> dict[str, Any]:
        return {**self.result.json(), "command": self.command, "consumer": self.consumer, "file": str(self.file)}


def convert_lora(request: requests.ConvertRequest, context: Context) -> WriteResult:
    """Write a LoRA in another key format, at most of the rank and with the blocks and kinds that are asked for. Raises
    UserError."""
    from i2l_ext.converters import rank as ranks
    from i2l_ext.converters.select import select

    exact = request.rank is None
    lora = whole = _read(request.file, request.dtype, context, request.alpha, base=request.base, exact_factors=exact)
    resizer = None
    if request.rank is not None:
        lora = ranks.resize(lora, {path: min(spec.rank, request.rank) for path, spec in lora.specs.items()})
        resizer = ranks.resizer_of(lora)
    lora = select(lora, request.blocks, request.kinds)
    key_format = request.key_format or lora.arch.key_format
    output = request.output or _beside(request.file, f"{key_format}.safetensors")
    progress = step_progress(request, context)
    read = [whole] if resizer else []
    return _write(request, lora, output, key_format, progress, context, resizer=resizer, card=request.file, read=read)


def resize_lora(request: requests.RankRequest, context: Context) -> WriteResult:
    """Write a LoRA at another rank: the nearest one, or the same with rows that can learn. Raises UserError."""
    from i2l_ext.converters import rank as ranks

    lora = _read(request.file, request.dtype, context, request.alpha, exact_factors=False)
    progress = step_progress(request, context)
    wanted: int | dict[str, int] = request.rank or 0
    if request.effect_kept is not None or request.per_module:
        ranks.resize(lora, request.rank or 1)  # refuses a rank out of range before the work
        values = ranks.singular_values(lora, exact=request.exact, progress=_part(progress, 0, 0.5))
        progress = _part(progress, 0.5, 1)
        if request.effect_kept is None:
            wanted = ranks.ranks_of_same_size(lora.arch, values, request.rank or 1)
        elif request.per_module:
            wanted = ranks.ranks_for(values, request.effect_kept)
        else:
            wanted = ranks.rank_for([*values.values()], request.effect_kept)
    resized = ranks.resize(lora, wanted, exact=request.exact, seed=request.seed)
    output = request.output or _beside(request.file, f"r{resized.rank}.safetensors")
    grows = any(spec.rank > lora.specs[path].rank for path, spec in resized.specs.items())
    fields = {"rank_from": str(lora.rank)} | ({"rank_seed": str(request.seed)} if grows else {})
    key_format, resizer = request.key_format or _key_format_of(lora), ranks.resizer_of(resized)
    return _write(request, resized, output, key_format, progress, context, fields, resizer, request.file, [lora])


def merge_loras(request: requests.MergeRequest, context: Context) -> WriteResult:
    """Write one LoRA from several, each with a weight. Raises UserError."""
    from i2l_ext.converters import concatenate
    from i2l_ext.converters import rank as ranks
    from i2l_ext.converters.metadata import common_metadata
    from i2l_ext.converters.select import select, weighted

    named = [requests.weighted_file(part) for part in request.parts]
    loras = [_read(path, request.dtype, context, text_encoders=False) for path, _ in named]
    weights = [weight for _, weight in named]
    parts = [weighted(lora, dict.fromkeys(lora, weight)) for lora, weight in zip(loras, weights, strict=True)]
    merged = select(concatenate(parts, [1.0] * len(parts)), request.blocks, request.kinds)
    merged = replace(merged, metadata=common_metadata([lora.metadata for lora in loras]))
    resizer = None
    if request.rank is not None:
        merged = ranks.resize(merged, request.rank)
        resizer = ranks.resizer_of(merged)
    recipe = json.dumps([{"file": path.name, "weight": weight} for path, weight in named])
    output = request.output or _beside(named[0][0], "merged.safetensors")
    key_format, progress = request.key_format or _key_format_of(loras[0]), step_progress(request, context)
    largest = max(named, key=lambda one: abs(one[1]))[0]
    return _write(request, merged, output, key_format, progress, context, {"merged": recipe}, resizer, largest, loras)


def export_lora(request: requests.ExportRequest, context: Context) -> ExportResult:
    """Write the folder from which a trainer starts. Raises UserError."""
    from i2l_ext.converters.export import export as write
    from i2l_ext.models.base_files import find_base
    from i2l_ext.operations import training_data

    for folder in request.models:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder.")
    lora = _read(request.file, None, context, request.alpha, exact_factors=request.rank is None, text_encoders=False)
    folder = request.output or _beside(request.file, request.trainer)
    sources = training_data.pictures_of(request, context)
    pictures = training_data.copies(sources)
    return ExportResult(
        write(
            lora, request.trainer, request.rank, folder, stem=_stem(request.file), fill=request.fill,
            exact=request.exact, seed=request.seed, overwrite=request.overwrite,
            pictures=pictures, **training_data.prompts(request, sources, pictures),
            bases=find_base(lora.arch, request.models), more_folders=bool(request.models),
            progress=step_progress(request, context), begin_saving=context.reporter.begin_saving,
        )
    )  # fmt: skip


def repair_lora(request: requests.RepairRequest, context: Context) -> RepairResult:
    """Do what ``check`` advises for a program. Raises UserError where there is nothing to do."""
    found = check_lora(requests.CheckRequest(request.file), context)
    verdict = next((one for one in found.verdicts if one.consumer.id == request.consumer), None)
    advised = repair_of(request.file, verdict) if verdict else None
    if advised is None:
        raise UserError("There is nothing to repair: that program loads it as it is, or cannot run it at all.")
    target = request.folder if isinstance(advised, requests.ExportRequest) else request.output
    result = REPAIRS[advised.kind](replace(advised, output=target), context)  # type: ignore[type-var]
    return RepairResult(advised.kind, request.consumer, target, result)


REPAIRS: Mapping[str, Any] = {"convert": convert_lora, "rank": resize_lora, "export": export_lora}
"""Kind of request -> what does it."""


def _key_format_of(lora: Lora) -> str:
    """The key format that a file is in, where it is one that is written."""
    spoken = lora.read_from.reading.key_format
    return spoken if spoken in KEY_FORMATS else lora.arch.key_format


def _stem(file: Path) -> str:
    """The name of a LoRA file without its ending, or of the folder that is one."""
    return file.resolve().name if file.is_dir() else file.stem


def _beside(file: Path, end: str) -> Path:
    """Where to write what is made of a LoRA: ``STEM_END``, in the same place."""
    return (file.resolve() if file.is_dir() else file).with_name(f"{_stem(file)}_{end}")


def _part(progress: Callable[[float], None], start: float, end: float) -> Callable[[float], None]:
    """The progress of a part of the step, from ``start`` to ``end`` of the whole."""
    return lambda share: progress(start + share * (end - start))


def _read(
    path: Path, dtype: str | None, context: Context, alpha: float | None = None,
    *, base: Path | None = None, exact_factors: bool = True, text_encoders: bool = True,
) -> Lora:  # fmt: skip
    """A LoRA to write anew. What will not be carried over is noted, but of a text encoder only where none
    of it can be (``text_encoders``). ``exact_factors``: those of every module will be
    made, which is refused where they are larger than the weight."""
    from i2l_ext.converters import Lora
    from i2l_ext.converters.network_files import require_small

    lora = Lora.read(path, base, alpha=alpha)
    if exact_factors:
        require_small(lora)
    source = lora.read_from
    reading = source.reading
    tensors = source.file.header.tensors
    if dtype is None and any(entry.dtype.startswith("F8") for entry in tensors.values()):
        raise UserError(f"{path.name}: its factors are fp8. Say --dtype fp32 (or bf16) to widen them.")
    for what, keys in {
        "foreign keys are not carried over": reading.foreign,
        "bias difference keys are not carried over": reading.biases,
        "keys are left out, because the file has their modules once more": reading.doubled,
        "alphas are left out, because their modules have no factors": reading.stray_alphas,
    }.items():
        if keys:
            names = ", ".join(keys[:2]) + (", …" if len(keys) > 2 else "")
            context.reporter.note(one_line(f"{path.name}: {len(keys)} {what}: {names}"))
    if lora.text_encoders and not text_encoders:
        context.reporter.note(one_line(f"{path.name}: {lora.text_encoders.line(None)}"))
    return lora


def _write(
    request: requests.ConvertRequest | requests.RankRequest | requests.MergeRequest,
    lora: Lora,
    output: Path,
    key_format: str,
    progress: Callable[[float], None],
    context: Context,
    fields: Mapping[str, str] | None = None,
    resizer: Resizer | None = None,
    card: Path | None = None,
    read: Sequence[Lora] = (),
) -> WriteResult:
    """Write the file, beside it what lies beside the LoRA ``card``; tell of numbers that are wider than in ``read``."""
    from i2l_ext.converters import atomic
    from i2l_ext.converters.metadata import updated_metadata
    from i2l_ext.converters.precision import widened_line
    from i2l_ext.library import cards

    if request.dtype:
        lora = lora.cast(DTYPES[request.dtype])
    metadata = updated_metadata(lora, key_format, output.stem, **fields or {})
    with cards.carried_over(card, output), atomic.atomic_path(output, overwrite=request.overwrite) as part:
        line = lora.write(part, key_format, name=output.name, metadata=metadata, lossy=request.lossy, progress=progress)
        context.reporter.begin_saving()
    text = f"{lora.text_encoders.file.path.name}: {lora.text_encoders.line(key_format)}" if lora.text_encoders else ""
    wide = "" if request.dtype else widened_line(read, lora)
    for note in (line, text, wide):
        if note:
            context.reporter.note(one_line(note))
    kept = resizer.effect_kept() if resizer else None
    dtypes = sorted({spec.dtype for spec in lora.specs.values()})
    return WriteResult(
        output, lora.arch, key_format, lora.rank, len({spec.rank for spec in lora.specs.values()}) == 1, len(lora),
        dtypes[0] if len(dtypes) == 1 else "mixed", output.stat().st_size, kept,
        lora.losses.lost() if lora.losses else None, line,
    )  # fmt: skip
