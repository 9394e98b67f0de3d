"""Making LoRAs from pictures: one, or one for each picture of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import i2l_ext
from i2l_ext import library
from i2l_ext.converters.errors import UserError, printable
from i2l_ext.library import metadata, names
from i2l_ext.models.heads import requested_model
from i2l_ext.models.listing import listing
from i2l_ext.operations.compute import callbacks, compute_options, embedding_cache, note_other_dtypes
from i2l_ext.operations.context import Context, Step
from i2l_ext.requests import CENTRE, BatchRequest, MakeRequest
from i2l_ext.v2_models.python import find_python

if TYPE_CHECKING:
    from i2l_ext.batch import SkippedMake
    from i2l_ext.models.catalogue import I2LModel
    from i2l_ext.pipeline import MakeResult

MINIATURE = "mini"

NOTE_MINIATURE = (
    "no model is downloaded, so this is made with `mini`, the built-in miniature: try it with `i2l draw`. "
    "For Qwen-Image: i2l models download qwen-image-style (20.6 GB)."
)


def make_lora(request: MakeRequest, context: Context) -> MakeResult:
    """Pictures in, a LoRA file with preview and sidecar out.

    Raises UserError for what the user can put right, Cancelled when the reporter says so; then nothing is left behind.
    """
    from i2l_ext import images, pipeline

    images.collect(request.pictures)  # a slip in their names is told before anything else
    complete = with_defaults(request)
    new_folder = request.folder is not None and not request.folder.exists()
    options = compute_options(context.options)
    model = requested_model(complete)
    context.reporter.plan([Step("start", "start"), *steps(model)])
    note_other_dtypes(complete.model or MINIATURE, options, context)
    python = find_python(context.options.diffsynth) if model.template else None
    rest = (options, callbacks(context.reporter), embedding_cache(context.options), python)
    prepared = pipeline.prepare(complete)
    made = pipeline.make_prepared(prepared, *rest)
    if made.loss:
        context.reporter.note(made.loss)
    if complete.grey:
        pair = pipeline.make_prepared(pipeline.grey_pair(prepared, made.name), *rest)
        note = f"{pair.name} is the LoRA of grey pictures, for the negative branch."
        wanted = names.grey_name(made.name)
        context.reporter.note(note + f" {wanted} was another file: rename one." * (pair.name != wanted))
        made = replace(made, grey=pair.name)
    _note_what_was_chosen(request, complete, new_folder, context)
    return made


@dataclass(frozen=True)
class BatchResult:
    """What came of ``asked`` LoRAs. Of one that was stopped, the rest is in neither list."""

    made: Sequence[MakeResult]
    skipped: Sequence[SkippedMake]
    asked: int

    def json(self) -> dict[str, Any]:
        made, skipped = ([asdict(one) for one in some] for some in (self.made, self.skipped))
        return {"made": made, "skipped": skipped, "asked": self.asked}


def make_batch(request: BatchRequest, context: Context) -> BatchResult:
    """The same as ``make_loras``, at its end. Whoever stops it keeps what was made, and what fails for all the rest is
    told with it; raises UserError and Cancelled before that."""
    from i2l_ext.batch import SkippedMake
    from i2l_ext.pipeline import MakeResult

    made: list[MakeResult] = []
    skipped: list[SkippedMake] = []
    asked = len(_requests_of(request, request))
    try:
        for one in make_loras(request, context):
            made += [one] if isinstance(one, MakeResult) else []
            skipped += [one] if isinstance(one, SkippedMake) else []
            if made:
                context.reporter.end_saving(BatchResult(made, skipped, asked).json())
    except UserError as error:
        if not made:
            raise
        skipped.append(SkippedMake("", str(error)))
    return BatchResult(made, skipped, asked)


def _requests_of(request: MakeRequest, template: MakeRequest) -> list[MakeRequest]:
    """A request for each LoRA, as ``template`` but for name and pictures."""
    from i2l_ext import batch

    if not isinstance(request, BatchRequest) or request.names is None:
        return batch.requests_of(request.pictures, template)
    groups: dict[str, list[tuple[Path, str]]] = {}
    crops = request.crops or (CENTRE,) * len(request.pictures)
    for name, path, crop in zip(request.names, request.pictures, crops, strict=True):
        groups.setdefault(name, []).append((path, crop))
    return [
        replace(template, pictures=tuple(path for path, _ in group), crops=tuple(crop for _, crop in group), name=name,
                names=None)  # type: ignore[call-arg]
        for name, group in groups.items()
    ]  # fmt: skip


def make_loras(request: BatchRequest | MakeRequest, context: Context) -> Iterator[MakeResult | SkippedMake]:
    """A LoRA for each picture and each sub-folder of ``request.pictures``; what is made already is skipped.

    Of several processes started by ``accelerate launch`` each takes its share. Raises UserError for what fails for
    all of them.
    """
    from i2l_ext import batch, images, pipeline

    if request.name is not None or request.weights is not None:
        raise UserError("--each names and weighs each LoRA by itself: leave out --name and --weights.")
    if request.crops is not None and not isinstance(request, BatchRequest):
        raise UserError("--each takes the centre of each picture: leave out --crops.")
    if named := [path for path in request.pictures if not path.is_dir()]:
        images.collect(named)
    complete = with_defaults(request)
    new_folder = request.folder is not None and not request.folder.exists()
    options = compute_options(context.options)
    requests = batch.share_of_process(_requests_of(request, complete))
    model = requested_model(complete)
    if model.template or complete.grey:
        raise UserError("--each goes with the models of the first kind and without --grey: make these one by one.")
    context.reporter.plan(steps(model))
    note_other_dtypes(complete.model or MINIATURE, options, context)
    if requests:
        told, cache = callbacks(context.reporter), embedding_cache(context.options)
        for made in batch.make_each(requests, options, told, cache):
            if isinstance(made, pipeline.MakeResult) and made.loss:
                context.reporter.note(made.loss)
            yield made
    _note_what_was_chosen(request, complete, new_folder, context)


def with_defaults(request: MakeRequest) -> MakeRequest:
    """The same with model, folder and name chosen where they were left out.

    Raises UserError where a value is out of its range, or where no LoRA folder is found.
    """
    request.validate()
    named = request.pictures
    request = as_like(request)
    folder = request.folder or library.find_lora_folder(Path(i2l_ext.__file__).resolve().parents[1])
    if folder is None:
        raise UserError("Say where to save the LoRA: --lora-dir PATH. No models/Lora folder was found from here.")
    name = names.suggest_name(named) if request.name is None else request.name
    return replace(request, name=name, folder=folder, model=request.model or default_model())


def as_like(request: MakeRequest) -> MakeRequest:
    """The same with what was not said taken from the LoRA ``like``: model, strength, options, and of the same pictures
    the weights and squares: a picture that gave several squares gives them again. Raises UserError where that LoRA does
    not say how it was made, or has other pictures."""
    from i2l_ext import images
    from i2l_ext.converters.files import TensorFile

    if request.like is None:
        return request
    with TensorFile(request.like) as file:
        made, heads = metadata.how_made(file.header.metadata), file.header.metadata.get("i2l.heads")
    if heads and request.heads is None:
        raise UserError(f"{request.like.name}: was made with heads of its own ({printable(heads)}). Give --heads.")
    if made is None:
        raise UserError(f"{request.like.name}: does not say how it was made. Name a LoRA that i2l has made.")
    known: dict[str, list[dict[str, Any]]] = {}
    for one in made["images"]:
        known.setdefault(one["sha256"], []).append(one)
    paths = images.collect(request.pictures)
    digests = [images.file_digest(path) for path in paths]
    if strange := [path.name for path, digest in zip(paths, digests, strict=True) if digest not in known]:
        raise UserError(f"{printable(strange[0])}: {request.like.name} was not made of it. Give its own pictures.")
    told = {"model": made["model"], "strength": made["strength"], **made["options"]}
    if request.crops is None:  # each picture once, with all its squares
        uses = [(path, one) for digest, path in dict(zip(digests, paths, strict=True)).items() for one in known[digest]]
        request = replace(request, pictures=tuple(path for path, _ in uses))
        if any("crop" in one for _, one in uses):
            told["crops"] = [one.get("crop", CENTRE) for _, one in uses]
        told["weights"] = [one["weight"] for _, one in uses]
    else:
        told["weights"] = [known[digest][0]["weight"] for digest in digests]
    fields = MakeRequest.fields()
    taken = {
        name: fields[name].parse(value)
        for name, value in told.items()
        if getattr(request, name) == fields[name].default and fields[name].accepts(value)
    }
    liked = replace(request, **taken)
    liked.validate()
    return liked


def default_model() -> str:
    """The first downloaded model that has no code of its own; without one the miniature."""
    rows = (row for row in listing() if row.ready and not row.has_code)
    return next((row.name for row in rows if any(part.repo for part in row.parts)), MINIATURE)


def steps(model: I2LModel) -> list[Step]:
    """The steps of a make, as the pipeline names them, with the bytes that each reads."""
    if model.template:
        return [Step("template", "template", model.template.nbytes)]
    heads = [expert.heads for expert in model.experts] + ([model.bias] if model.bias else [])
    encode = [
        Step(f"encode {part.id}", f"encode {part.id}", part.nbytes, getattr(part.spec, "layers", None))
        for part in model.encoders
    ]
    return [*encode, Step("decode", "decode", sum(part.nbytes for part in heads), len(model.arch.i2l_modules))]


def _note_what_was_chosen(request: MakeRequest, complete: MakeRequest, new_folder: bool, context: Context) -> None:
    if new_folder and request.folder:
        context.reporter.note(f"{request.folder.name}: there was no such folder, so it was made.")
    if request.model is None and complete.model == MINIATURE:
        context.reporter.note(NOTE_MINIATURE)
