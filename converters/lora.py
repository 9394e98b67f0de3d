"""A LoRA as a value: an architecture and, for each of its modules, a down and an up factor.

The update of a module is delta = up @ down, without a further scale: alpha is multiplied in when a file is read.
Factors are made on demand, one module at a time, so a file larger than memory can be read, changed and written.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from . import atomic, files, key_formats, keys, precision, scales, spellings, threads
from .architectures import Architecture
from .errors import UserError
from .metadata import true_metadata
from .text_encoders import TextEncoderPart, read_text_encoders

if TYPE_CHECKING:
    import torch

    from .rank import SVD

    Pair = tuple[torch.Tensor, torch.Tensor]

FLOATS = ("F32", "BF16", "F16", "F64", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class FactorSpec:
    """Rank and dtype (the format's name) of a module's factors, known before they are made."""

    rank: int
    dtype: str

    def times(self, scale: float) -> FactorSpec:
        """Of the factors multiplied by ``scale``: the same, or float32 where a digit would be lost."""
        return self if multiplies_exactly(scale, self.dtype) else FactorSpec(self.rank, "F32")


@dataclass(frozen=True)
class Lora:
    """``specs``: by module path; ``load(path)``: makes the factors of a module, down [rank, d_in] and up [d_out, rank];
    ``metadata``: what its file says about itself; ``losses``: where they are cast to a dtype of few exponents, what the
    factors that were made so far lost by it; ``text_encoders``: their part of the file, which is written unchanged, as
    far as the key format has names for it."""

    arch: Architecture
    specs: Mapping[str, FactorSpec]
    load: Callable[[str], Pair] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    losses: precision.Losses | None = field(default=None, repr=False)
    text_encoders: TextEncoderPart | None = field(default=None, repr=False)

    @staticmethod
    def of(arch: Architecture, modules: Mapping[str, Pair], metadata: Mapping[str, str] | None = None) -> Lora:
        """From factors in memory: {path: (down [rank, d_in], up [d_out, rank])}.

        Raises UserError where a module or a shape is not the architecture's.
        """
        specs = {}
        for path, (down, up) in modules.items():
            if path not in arch.modules:
                raise UserError(f"{arch.title} has no module {path}.")
            d_out, d_in = arch.modules[path].shape
            if down.shape != (down.shape[0], d_in) or up.shape != (d_out, down.shape[0]):
                raise UserError(
                    f"{path}: factors {list(down.shape)} and {list(up.shape)} do not fit [{d_out}, {d_in}]."
                )
            specs[path] = FactorSpec(down.shape[0], files.FORMAT_NAMES[str(down.dtype).removeprefix("torch.")])
        return Lora(arch, specs, modules.__getitem__, metadata or {})

    @staticmethod
    def read(path: Path | str, base: Path | str | None = None, *, alpha: float | None = None) -> Lora:
        """From a file in any key format, which stays open as long as the value lives, or from a folder of PEFT's.
        ``base``: the base model's weights, a checkpoint or a folder of them, which a DoRA needs.

        ``alpha``: of a file that does not say its own. Raises UserError where it is not a LoRA of a known model.
        """
        return from_file(files.TensorFile(scales.lora_file(path)), base, alpha)

    def __getitem__(self, path: str) -> Pair:
        return self.load(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def source(self) -> FileFactors | None:
        """The file that the factors are read from. None where they were changed; modules may have been left out."""
        return self.load if isinstance(self.load, FileFactors) else None

    @property
    def read_from(self) -> FileFactors:
        """The same, for a LoRA that was read from a file and not changed. Raises TypeError for another."""
        if self.source is None:
            raise TypeError("This LoRA was not read from a file, or was changed since.")
        return self.source

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max((spec.rank for spec in self.specs.values()), default=0)

    def delta(self, path: str) -> torch.Tensor:
        """The update of a module's weight, up @ down, float32 [d_out, d_in]."""
        down, up = self[path]
        return up.float() @ down.float()

    def scaled(self, weight: float) -> Lora:
        """The same with its update multiplied by ``weight``, in the down factors. These keep their dtype if that
        loses no digit, else all become float32."""
        if weight == 1:
            return self
        specs = {path: spec.times(weight) for path, spec in self.specs.items()}
        return replace(self, specs=specs, load=partial(_scaled, self.load, weight, specs), text_encoders=None)

    def cast(self, dtype: str) -> Lora:
        """The same with factors in another dtype (the format's name). `save` refuses what loses too much by it."""
        losses = precision.Losses() if dtype in precision.NARROW else None
        text = self.text_encoders and replace(self.text_encoders, dtype=dtype, losses=losses)
        if all(spec.dtype == dtype for spec in self.specs.values()):
            return replace(self, losses=losses, text_encoders=text) if text else self
        specs = {path: FactorSpec(spec.rank, dtype) for path, spec in self.specs.items()}
        load = partial(_cast, self.load, files.torch_dtype(dtype), losses)
        return replace(self, specs=specs, load=load, losses=losses, text_encoders=text)

    def save(
        self,
        path: Path | str,
        key_format: str | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
        lossy: bool = False,
        progress: Callable[[float], None] = lambda share: None,
    ) -> str | None:
        """Write to a file that appears whole or not at all, in the architecture's own key format unless another is
        named. Alpha, where the key format has one, is the rank.
        ``progress`` is told after each factor what share of the file is written, 0 to 1.

        ``metadata``: its own unless given; ranks, alphas and hashes in it become true, or are left out.
        Returns one line on what a cast has lost, None where that is not worth telling. Raises UserError where it is
        more than 1 % (unless ``lossy``), where ``path`` exists (unless ``overwrite``) or cannot be written, and for NaN
        or infinity.
        """
        with atomic.atomic_path(Path(path), overwrite=overwrite) as part:
            return self.write(part, key_format, name=Path(path).name, metadata=metadata, lossy=lossy, progress=progress)

    def write(
        self,
        path: Path,
        key_format: str | None = None,
        *,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
        lossy: bool = False,
        progress: Callable[[float], None] = lambda share: None,
    ) -> str | None:
        """Write to ``path`` directly, a module at a time; ``name``: what messages call it. After an error a part of it
        remains. Returns and raises as `save`."""
        how = key_formats.KEY_FORMATS[key_format or self.arch.key_format]
        with path.open("wb") as stream:
            told = true_metadata(self, self.metadata if metadata is None else metadata)
            files.write(stream, _write_plans(self, how), told, progress)
        return self.losses.line(name or path.name, lossy=lossy) if self.losses else None


def from_file(file: files.TensorFile, base: Path | str | None = None, alpha: float | None = None) -> Lora:
    """The LoRA in an open file. Factors are read when they are asked for. Raises UserError as `Lora.read`."""
    name = file.path.name
    reading = keys.parse_keys(file.header.shapes, name)
    if reading.mixed:
        path, kinds = reading.mixed[0]
        raise UserError(f"{name}: the module {path} holds {kinds}, and one network a module is read.")
    if reading.halves:
        raise UserError(f"{name}: {reading.halves[0]} has only one of its two factors.")
    if reading.collisions:
        path, first, second = reading.collisions[0]
        raise UserError(f"{name}: two keys name the module {path}: {first!r} and {second!r}.")
    told = scales.read_scales(file, reading, alpha)
    if told.problems:
        raise UserError(f"{name}: {told.problems[0]}.")
    specs = {path: _spec(file, path, slot, told.values[path]) for path, slot in reading.slots.items()}
    factors = FileFactors(file, reading, told.values, specs)
    if reading.networks:
        from .network_files import with_networks

        factors = with_networks(factors, base)
    text = read_text_encoders(file, reading.arch.id, reading.text_encoder) if reading.text_encoder else None
    return Lora(reading.arch, factors.specs, factors, file.header.metadata, text_encoders=text)


def _spec(file: files.TensorFile, path: str, slot: keys.Slot, scale: float) -> FactorSpec:
    down, up = file.info(slot.down), file.info(slot.up)
    for info in (down, up):
        if info.dtype not in FLOATS:
            raise UserError(f"{file.path.name}: {path} has the dtype {info.dtype}, which no LoRA has.")
    dtype = down.dtype if down.dtype == up.dtype and not down.dtype.startswith("F8") else "F32"
    return FactorSpec(down.shape[0], dtype).times(scale)


def multiplies_exactly(scale: float, dtype: str) -> bool:
    """Whether multiplying numbers of ``dtype`` (the format's name) by ``scale`` loses no digit: ``scale`` is a power of
    two, and the exponent is wide enough. That of float16 has five bits, and factors come near its lower end."""
    return abs(scale) == 1 or (math.frexp(scale)[0] in (0.5, -0.5) and dtype in ("F32", "BF16", "F64"))


@dataclass(frozen=True)
class FileFactors:
    """The factors in a file: as tensors with the scale multiplied into the up factor, or as bytes if it is 1."""

    file: files.TensorFile
    reading: keys.Reading
    scales: Mapping[str, float]
    specs: Mapping[str, FactorSpec]

    def __call__(self, path: str) -> Pair:
        slot, dtype = self.reading.slots[path], files.torch_dtype(self.specs[path].dtype)
        down, up = self.file.tensor(slot.down).to(dtype), self.file.tensor(slot.up)
        if slot.rows:
            up = up[slice(*slot.rows)]
        up = up.to(dtype)
        return down, up if self.scales[path] == 1 else up * self.scales[path]

    def raw(self, path: str, factor: int) -> Iterator[memoryview] | None:
        """The bytes of the down (0) or up (1) factor in pieces; None where they have to be computed."""
        slot = self.reading.slots[path]
        name = (slot.down, slot.up)[factor]
        info = self.file.info(name)
        if info.dtype != self.specs[path].dtype or (factor == 1 and self.scales[path] != 1):
            return None
        if factor == 0 or slot.rows is None:
            return self.file.chunks(name)
        row = info.nbytes // info.shape[0]
        return self.file.chunks(name, slot.rows[0] * row, slot.rows[1] * row)

    def svd(self, path: str, rank: int | None, *, exact: bool) -> SVD | None:
        """The decomposition of a module's update where there is a shorter way than by its factors."""
        return None


def _scaled(load: Callable[[str], Pair], weight: float, specs: Mapping[str, FactorSpec], path: str) -> Pair:
    dtype = files.torch_dtype(specs[path].dtype)
    down, up = load(path)
    return down.to(dtype) * weight, up.to(dtype)


def _cast(load: Callable[[str], Pair], dtype: torch.dtype, losses: precision.Losses | None, path: str) -> Pair:
    down, up = before = load(path)
    after = down.to(dtype), up.to(dtype)
    if losses:
        losses.measure(path, before, after)
    return after


def _write_plans(lora: Lora, key_format: key_formats.KeyFormat) -> Iterator[files.WritePlan]:
    """The tensors of a file, in order."""
    layers = ((layer, key_format) for layer in _layers(lora, key_format))
    for layer, how in chain(layers, _text_layers(lora.text_encoders, key_format)):
        d_out, d_in = layer.shape
        rank, dtype = layer.spec.rank, layer.spec.dtype
        down, up, alpha = how.keys(layer.name)
        if alpha:
            yield files.WritePlan(alpha, "F32", (), partial(_number, rank))
        yield files.WritePlan(down, dtype, (rank, d_in), partial(layer.chunks, 0))
        yield files.WritePlan(up, dtype, (d_out, rank), partial(layer.chunks, 1))


def _text_layers(
    part: TextEncoderPart | None, key_format: key_formats.KeyFormat
) -> Iterator[tuple[_LayerWriter, key_formats.KeyFormat]]:
    if part is None:
        return
    for how, layer in part.written(key_format.name):
        spec = FactorSpec(layer.rank, layer.dtype).times(layer.scale)
        dtype = part.dtype or spec.dtype
        load = partial(_cast, part.load, files.torch_dtype(dtype), part.losses, layer.name)
        yield _LayerWriter(layer.name, FactorSpec(layer.rank, dtype), layer.shape, load), how


def _number(value: float) -> list[bytes]:
    return [struct.pack("<f", value)]


def _layers(lora: Lora, key_format: key_formats.KeyFormat) -> Iterator[_LayerWriter]:
    """The layers to write: our modules, or the native layers in the place of their first module."""
    native = spellings.native_layers(lora.arch.id) if key_format.native else {}
    raw = lora.source.raw if lora.source else None
    done: set[str] = set()
    for path, spec in lora.specs.items():
        layer = native.get(path, spellings.NativeLayer(path, (path,)))
        shape = lora.arch.modules[path].shape
        if len(layer.paths) == 1:
            yield _LayerWriter(layer.name, spec, shape, partial(lora.load, path), partial(raw, path) if raw else None)
        elif layer.name not in done:
            done.add(layer.name)
            fused, load = fused_factors(lora, layer.paths)
            yield _LayerWriter(layer.name, fused, lora.arch.fused.modules[layer.name].shape, load)


def fused_factors(lora: Lora, paths: Sequence[str]) -> tuple[FactorSpec, Callable[[], Pair]]:
    """Several modules as the rows of one layer, in this order: what its factors are, and what makes them. A module that
    the LoRA lacks has zeros. If all have the same down factor, the layer has it too, at the same rank. Otherwise its
    factors hold theirs block by block, which is exact as well."""
    import torch

    specs = [lora.specs[path] for path in paths if path in lora.specs]
    heights = [lora.arch.modules[path].shape[0] for path in paths]
    dtypes = {spec.dtype for spec in specs}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    shared = len({spec.rank for spec in specs}) == 1
    if shared and len(specs) > 1:
        downs = [lora.load(path)[0] for path in paths if path in lora.specs]
        shared = all(torch.equal(down, downs[0]) for down in downs)
    rank = specs[0].rank if shared else sum(spec.rank for spec in specs)

    def load() -> Pair:
        pairs = [lora.load(path) if path in lora.specs else None for path in paths]
        made = [(down.to(files.torch_dtype(dtype)), up) for down, up in filter(None, pairs)]
        down = made[0][0] if shared else torch.cat([down for down, _ in made])
        up, row, column = down.new_zeros(sum(heights), rank), 0, 0
        for height, pair in zip(heights, pairs, strict=True):
            if pair:
                width = pair[1].shape[1]
                up[row : row + height, column : column + width] = pair[1]
                column += 0 if shared else width
            row += height
        return down, up

    return FactorSpec(rank, dtype), load


@dataclass
class _LayerWriter:
    """Writes a layer: copies its bytes if it can, else makes both factors for the down factor and keeps them until the
    up factor is written."""

    name: str
    spec: FactorSpec
    shape: tuple[int, int]
    load: Callable[[], Pair]
    raw: Callable[[int], Iterator[memoryview] | None] | None = None
    pair: Pair | None = None

    def chunks(self, factor: int) -> Iterator[memoryview]:
        pieces = self.raw(factor) if self.raw else None
        for piece in [self._made(factor)] if pieces is None else pieces:
            if not files.all_finite(piece, self.spec.dtype):
                raise UserError(f"{self.name}: the factors hold NaN or infinity; nothing was written.")
            yield piece

    def _made(self, factor: int) -> memoryview:
        with threads.one_thread():
            pair = self.pair or self.load()
        self.pair = pair if factor == 0 else None
        return files.tensor_bytes(pair[factor].detach().cpu().contiguous())


def concatenate(parts: Sequence[Lora], scales: Sequence[float]) -> Lora:
    """One LoRA whose update is the sum of scale x update: the rows of down and the columns of up are concatenated.

    The ranks add up. Modules keep the order of the first part that has them. Raises UserError where the architectures
    differ, and ValueError where there is not one scale for each part.
    """
    if len(parts) != len(scales) or not parts:
        raise ValueError(f"{len(parts)} parts, {len(scales)} scales")
    first = parts[0]
    for part in parts:
        if part.arch is not first.arch:
            raise UserError(
                f"A LoRA of {part.arch.title} cannot be merged with one of {first.arch.title}: "
                "all must be of one model."
            )
    paths = list(dict.fromkeys(path for part in parts for path in part.specs))
    scaled = [part.scaled(scale) for part, scale in zip(parts, scales, strict=True)]
    specs = {}
    for path in paths:
        here = [part.specs[path] for part in scaled if path in part.specs]
        dtypes = {spec.dtype for spec in here}
        specs[path] = FactorSpec(sum(spec.rank for spec in here), dtypes.pop() if len(dtypes) == 1 else "F32")
    return Lora(first.arch, specs, partial(_concatenated, scaled, specs))


def _concatenated(parts: Sequence[Lora], specs: Mapping[str, FactorSpec], path: str) -> Pair:
    import torch

    dtype = files.torch_dtype(specs[path].dtype)
    pairs = [part[path] for part in parts if path in part.specs]
    downs, ups = zip(*pairs, strict=True)
    return torch.cat([down.to(dtype) for down in downs]), torch.cat([up.to(dtype) for up in ups], dim=1)
