"""The story: pictures -> embeddings -> LoRA -> file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from i2l_ext import images, library
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.rank import resize
from i2l_ext.converters.select import select
from i2l_ext.library import metadata, names
from i2l_ext.library.collage import collage
from i2l_ext.models import store
from i2l_ext.models.heads import requested_model
from i2l_ext.requests import DTYPES, MakeRequest, Square, parse_crop
from i2l_ext.weights.compute import DEFAULT_OPTIONS, NO_CALLBACKS, Callbacks, ComputeOptions

if TYPE_CHECKING:
    from i2l_ext.converters.lora import Lora, Pair
    from i2l_ext.embed import Embeddings
    from i2l_ext.encoders.cache import EmbeddingCache
    from i2l_ext.models.catalogue import I2LModel
    from i2l_ext.v2_models.python import DiffSynthPython


@dataclass(frozen=True)
class MakeResult:
    """The LoRA that was made; the fields of ``i2l make --json``. ``settings``: those that the authors generate with.
    ``lost``: in fp16, the share of the update that is lost in rounding; ``loss``: a line about it, if it is worth
    telling. ``grey``: the name of its pair, where that was asked for."""

    file: str
    name: str
    model: str
    arch: str
    key_format: str
    rank: int
    modules: int
    bytes: int
    prompt: str
    preview: str
    sidecar: str
    images: list[dict[str, Any]]
    seconds: dict[str, float]
    settings: dict[str, Any] | None = None
    lost: float | None = None
    loss: str | None = None
    grey: str | None = None

    def json(self) -> dict[str, Any]:
        unmeasured = {name for name in ("lost", "loss", "grey") if getattr(self, name) is None}
        return {name: value for name, value in asdict(self).items() if name not in unmeasured}


@dataclass(frozen=True)
class PreparedMake:
    """A request whose pictures are open. ``shares`` says how much each picture counts; they add up to 1."""

    request: MakeRequest
    name: str
    folder: Path
    model: I2LModel
    pictures: Sequence[images.Picture]
    shares: Sequence[float]

    @property
    def scales(self) -> list[float]:
        """The factor of each picture's update. Where pictures are seen together, their sum scales the update, and
        their ratios say how much each picture counts."""
        return [self.request.strength * share for share in self.shares]

    @property
    def own_heads(self) -> str | None:
        """The id of heads that the user named; None where they are the model's."""
        return self.model.experts[0].heads.id if self.request.heads else None

    @property
    def dtype(self) -> str | None:
        """The number format of the file, by safetensors' name; None: as made."""
        return DTYPES[self.request.dtype] if self.request.dtype else None

    @property
    def key_format(self) -> str:
        return self.request.key_format or self.model.arch.key_format

    @property
    def origins(self) -> list[dict[str, Any]]:
        """Of each picture its ``sha256``, its ``weight`` (share) and, where it is not the centre, its ``crop``. File
        names are private and left out."""
        return [
            {"sha256": one.sha256, "weight": share, **({"crop": str(one.crop)} if one.crop else {})}
            for one, share in zip(self.pictures, self.shares, strict=True)
        ]

    @property
    def digest(self) -> str:
        """SHA-256 over all that decides what the LoRA does. A later run recognises the file by it.

        Name, folder and card (description, words for the prompt) are left out: users change them by hand. Device and
        precision are left out too: they change the last digits only.
        """
        request = self.request
        shape = [self.key_format, self.dtype, request.rank, request.blocks, request.kinds]
        heads = [self.own_heads] if self.own_heads else []
        facts = [self.model.name, *heads, self.origins, float(request.strength), *shape]
        return sha256(json.dumps(facts).encode()).hexdigest()


def make(
    request: MakeRequest,
    options: ComputeOptions = DEFAULT_OPTIONS,
    callbacks: Callbacks = NO_CALLBACKS,
    cache: EmbeddingCache | None = None,
    python: DiffSynthPython | None = None,
) -> MakeResult:
    """Pictures in, LoRA file out. The steps are ``encode ID`` for each encoder, then ``decode``; for a v2 model
    ``template`` alone.

    Name, folder and model of the request must be set, else ValueError. ``python`` runs a template. Raises UserError
    for what the user can put right, Cancelled when the user wants to stop; then nothing is left behind.
    """
    return make_prepared(prepare(request), options, callbacks, cache, python)


def make_prepared(
    prepared: PreparedMake,
    options: ComputeOptions = DEFAULT_OPTIONS,
    callbacks: Callbacks = NO_CALLBACKS,
    cache: EmbeddingCache | None = None,
    python: DiffSynthPython | None = None,
) -> MakeResult:
    """The same of a request whose pictures are open."""
    from i2l_ext.embed import embed

    model, files = prepared.model, store.require(prepared.model)
    clock = PhaseClock()
    with ExitStack() as opened:
        if model.template:
            with clock.phase("decode"):
                lora = finish(
                    [by_template(prepared, files, options, callbacks, python, opened)], prepared, files, opened
                )
            return save_result(prepared, clock.watch(lora, callbacks), clock, callbacks)
        with clock.phase("encode"):
            embeddings = embed(prepared.pictures, model, files, options, callbacks, cache)
        callbacks.step("decode")
        parts = open_parts(model, files, embeddings, prepared.scales, callbacks, opened)
        lora = finish(parts, prepared, files, opened)
        return save_result(prepared, clock.watch(lora, callbacks), clock, callbacks)


def prepare(request: MakeRequest) -> PreparedMake:
    """Check what can be checked before the slow part, and open the pictures.

    Raises UserError; ValueError where name, folder or model are not set.
    """
    if request.name is None or request.folder is None or request.model is None:
        raise ValueError("name, folder and model of the request must be set")
    name = names.check_name(request.name)
    if request.grey:
        names.check_name(names.grey_name(name))
    library.check_folder(request.folder)
    model = requested_model(request)
    paths = images.collect(request.pictures)
    shares = shares_of(request.weights, len(paths))
    if model.template and len(set(shares)) > 1:
        raise UserError(f"{model.name} sees all pictures together: leave out --weights.")
    crops = crops_of(request.crops, len(paths))
    pictures = [images.open_image(path, sizes=model.views, crop=crop) for path, crop in zip(paths, crops, strict=True)]
    return PreparedMake(request, name, request.folder, model, pictures, shares)


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """How much each of ``count`` pictures counts: w_i / sum(w), and for equal weights exactly 1 / N.

    Raises UserError unless there is one positive weight for each picture.
    """
    weights = [1.0] * count if weights is None else weights
    if len(weights) != count:
        raise UserError(f"{len(weights)} weights for {count} pictures: give one weight for each picture.")
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError("A picture's weight must be greater than 0. Leave out a picture that is to have no part.")
    if len(set(weights)) == 1:
        return [1 / count] * count
    return [weight / sum(weights) for weight in weights]


def crops_of(crops: Sequence[str] | None, count: int) -> list[Square | None]:
    """The square of each of ``count`` pictures; None: the centre. Raises UserError unless there is one for each."""
    if crops is None:
        return [None] * count
    if len(crops) != count:
        raise UserError(f"{len(crops)} crops for {count} pictures: give one square for each picture.")
    return list(map(parse_crop, crops))


def open_parts(
    model: I2LModel,
    files: Mapping[str, Sequence[Path]],
    embeddings: Embeddings,
    scales: Sequence[float],
    callbacks: Callbacks,
    opened: ExitStack,
) -> list[Lora]:
    """Each expert's part of the LoRA, its decoder open. A factor is made when it is asked for, while ``opened`` is.

    ``files``: the paths of each checkpoint, by its id. ``scales``: the factor of each picture's update. Raises
    UserError for a checkpoint that is not what it should be.
    """
    from i2l_ext.decoder.decode import Decoder

    parts = []
    for expert in model.experts:
        [path] = files[expert.heads.id]
        decoder = opened.enter_context(Decoder(path, expert.heads.spec, callbacks))
        tokens = embeddings.tokens.get(expert.view) if expert.view else None
        parts.append(decoder.lora(embeddings.image, scales, tokens))
    return parts


def by_template(
    prepared: PreparedMake,
    files: Mapping[str, Sequence[Path]],
    options: ComputeOptions,
    callbacks: Callbacks,
    python: DiffSynthPython | None,
    opened: ExitStack,
) -> Lora:
    """The LoRA that a template makes of the pictures' squares, all together, while ``opened`` is open.

    Raises UserError; ValueError where there is no ``python`` or no template.
    """
    from i2l_ext.v2_models.repository import TemplateRepository
    from i2l_ext.v2_models.run import template_lora

    template = prepared.model.template
    if template is None or python is None:
        raise ValueError("a template and a Python are needed")
    callbacks.step("template")
    repository = TemplateRepository(
        files[template.id][0].parent, template.repo or "", prepared.model.name, callbacks.check
    )
    folder = Path(opened.enter_context(TemporaryDirectory(prefix="i2l-made-")))
    squares = [picture.square for picture in prepared.pictures]
    lora = template_lora(repository, prepared.model.arch, squares, python, folder, callbacks, device=options.device)
    return lora.scaled(prepared.request.strength)


def grey_pair(prepared: PreparedMake, made: str) -> PreparedMake:
    """The request for the LoRA of grey pictures, as many as there are, for the negative branch of the LoRA
    ``made``. The authors take the value 128 (DiffSynth-Studio's examples)."""
    request, name = prepared.request, names.grey_name(made)
    grey = images.plain((128, 128, 128), prepared.model.views)
    note = f"For the negative branch, beside {made}."
    request = replace(request, name=name, grey=False, weights=None, crops=None, activation_text="", description=note)
    count = len(prepared.pictures)
    return replace(prepared, request=request, name=name, pictures=[grey] * count, shares=shares_of(None, count))


def finish(
    parts: Sequence[Lora], prepared: PreparedMake, files: Mapping[str, Sequence[Path]], opened: ExitStack
) -> Lora:
    """The experts' parts side by side, then the bias; with the blocks, kinds, rank and dtype of the request.

    Without a dtype in the request it is that of the experts. The dtype of the bias is ignored: its file may be an fp8.
    Raises UserError for a bias of another model.
    """
    from i2l_ext.converters.files import TensorFile
    from i2l_ext.converters.lora import concatenate, from_file

    request, model = prepared.request, prepared.model
    factors = [1.0] * len(parts)
    dtypes = {spec.dtype for part in parts for spec in part.specs.values()}
    dtype = prepared.dtype or (dtypes.pop() if len(dtypes) == 1 else "F32")
    if model.bias:
        [path] = files[model.bias.id]
        bias = from_file(opened.enter_context(TensorFile(path)))
        if bias.arch is not model.arch:
            raise UserError(f"{path.name}: a LoRA of {bias.arch.title}, not of {model.arch.title}.")
        parts, factors = [*parts, bias], [*factors, request.strength]
    lora = concatenate(parts, factors) if len(parts) > 1 else parts[0]
    lora = select(lora, request.blocks, request.kinds)
    if request.rank is not None:
        lora = resize(lora, request.rank)
    return lora.cast(dtype)


def save_result(prepared: PreparedMake, lora: Lora, clock: PhaseClock, callbacks: Callbacks) -> MakeResult:
    """Write the LoRA, its preview and its sidecar. Raises UserError, Cancelled; then nothing is left behind."""
    request, model = prepared.request, prepared.model
    sidecar = metadata.sidecar(
        description=request.description,
        sd_version=metadata.sd_version(model.arch.id, request.host),
        activation_text=request.activation_text,
        negative_text=model.settings.negative_prompt if model.settings else "",
        notes=f"Settings of the authors: {model.settings.line}." if model.settings else "",
    )
    preview = collage([picture.square for picture in prepared.pictures])
    loss: str | None = None

    def write(path: Path, stem: str) -> None:
        nonlocal loss
        facts = metadata.lora_metadata(
            stem,
            arch_id=model.arch.id,
            model=model.name,
            rank=lora.rank,
            description=request.description,
            images=prepared.origins,
            strength=request.strength,
            request=prepared.digest,
            options={name: getattr(request, name) for name in metadata.OPTIONS} | {"key_format": prepared.key_format},
            heads=prepared.own_heads,
            pair=names.grey_name(stem) if request.grey else None,
        )
        loss = lora.write(path, prepared.key_format, name=f"{stem}.safetensors", metadata=facts, lossy=request.lossy)
        callbacks.begin_saving()

    with clock.phase("save"):
        saved = library.save_lora(
            prepared.folder, prepared.name, write, preview=preview, sidecar=sidecar, overwrite=request.overwrite
        )
    return MakeResult(
        file=str(saved.file),
        name=saved.name,
        model=model.name,
        arch=model.arch.id,
        key_format=prepared.key_format,
        rank=lora.rank,
        modules=len(lora),
        bytes=saved.file.stat().st_size,
        prompt=f"<lora:{saved.name}:1>",
        preview=str(saved.preview),
        sidecar=str(saved.sidecar),
        images=prepared.origins,
        seconds=clock.seconds,
        lost=lora.losses.lost() if lora.losses else None,
        loss=loss,
        settings=model.settings.json() if model.settings else None,
    )


@dataclass
class PhaseClock:
    """Seconds by phase. Decoding happens while the file is written; its time is taken off the writing's."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("encode", "decode", "save"), 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block."""
        start, decoded = time.perf_counter(), self.seconds["decode"]
        yield
        self.seconds[name] += time.perf_counter() - start - (self.seconds["decode"] - decoded)

    def portion(self, share: float) -> PhaseClock:
        """A clock for one of several LoRAs that were made together: its share of the time so far."""
        return PhaseClock({phase: seconds * share for phase, seconds in self.seconds.items()})

    def watch(self, lora: Lora, callbacks: Callbacks) -> Lora:
        """The same LoRA. Making its factors counts as decoding, reports progress, and can be stopped."""
        done: set[str] = set()

        def load(path: str) -> Pair:
            callbacks.check()
            start = time.perf_counter()
            try:
                pair = lora.load(path)
            except OSError as error:  # else it would be taken for an error of the file that is being written
                raise UserError(f"The model files cannot be read ({error.strerror or error}).") from error
            self.seconds["decode"] += time.perf_counter() - start
            done.add(path)
            callbacks.progress(len(done) / len(lora))
            return pair

        return replace(lora, load=load)
