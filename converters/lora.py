"""A LoRA as a value: an architecture and, for each of its modules, a down and an up factor.

The update of a module is delta = up @ down, with nothing else to scale it: an alpha is folded in on reading.
Factors are made on demand, a module at a time, so that files larger than memory can be read, changed and written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import dialects, files
from .architectures import Architecture
from .errors import UserError

if TYPE_CHECKING:
    import torch

    Pair = tuple[torch.Tensor, torch.Tensor]

FLOATS = ("F32", "BF16", "F16", "F64", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Spec:
    """What is known of a module's factors before they are made: their rank and their dtype (the format's name)."""

    rank: int
    dtype: str


@dataclass(frozen=True)
class Lora:
    """``specs``: by module path; ``load``: makes the factors of one, (down [rank, d_in], up [d_out, rank])."""

    arch: Architecture
    specs: Mapping[str, Spec]
    load: Callable[[str], Pair] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(arch: Architecture, modules: Mapping[str, Pair], metadata: Mapping[str, str] | None = None) -> Lora:
        """From factors in memory. Raises UserError where a module or a shape is not the architecture's."""
        specs = {}
        for path, (down, up) in modules.items():
            if path not in arch.modules:
                raise UserError(f"{arch.title} has no module {path}.")
            d_out, d_in = arch.modules[path].shape
            if down.shape != (down.shape[0], d_in) or up.shape != (d_out, down.shape[0]):
                raise UserError(
                    f"{path}: factors {list(down.shape)} and {list(up.shape)} do not fit [{d_out}, {d_in}]."
                )
            specs[path] = Spec(down.shape[0], files.FORMAT_NAMES[str(down.dtype).removeprefix("torch.")])
        return Lora(arch, specs, modules.__getitem__, metadata or {})

    @staticmethod
    def read(path: Path | str) -> Lora:
        """From a file in any dialect; the file stays open as long as the value lives. Raises UserError."""
        return from_file(files.TensorFile(path))

    def __getitem__(self, path: str) -> Pair:
        return self.load(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max((spec.rank for spec in self.specs.values()), default=0)

    def delta(self, path: str) -> torch.Tensor:
        """The update of a module's weight, up @ down, float32 [d_out, d_in]."""
        down, up = self[path]
        return up.float() @ down.float()

    def scaled(self, weight: float) -> Lora:
        """The same with its update times ``weight``; the down factors carry it."""
        if weight == 1:
            return self
        return replace(self, load=partial(_scaled, self.load, weight))

    def cast(self, dtype: str) -> Lora:
        """The same with factors in another dtype (the format's name)."""
        specs = {path: Spec(spec.rank, dtype) for path, spec in self.specs.items()}
        return replace(self, specs=specs, load=partial(_cast, self.load, files.torch_dtype(dtype)))

    def save(
        self,
        path: Path | str,
        dialect: str = dialects.DEFAULT,
        *,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write to a file that appears whole or not at all. Raises UserError, also for a factor that is not finite."""
        with files.appearing(Path(path), overwrite=overwrite) as part:
            self.write(part, dialect, metadata=metadata)

    def write(self, path: Path, dialect: str = dialects.DEFAULT, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write to ``path``, which exists or not, a module at a time; nothing is cleaned up after an error."""
        how = dialects.DIALECTS[dialect]
        with path.open("wb") as stream:
            files.write(stream, _plans(self, how), self.metadata if metadata is None else metadata)


def from_file(file: files.TensorFile) -> Lora:
    """The LoRA that an open file holds, read when asked for."""
    reading = dialects.parse(file.header.shapes, file.path.name)
    if reading.halves:
        raise UserError(f"{file.path.name}: {reading.halves[0]} has only one of its two factors.")
    specs = {}
    for path, slot in reading.slots.items():
        dtypes = {file.entry(slot.down).dtype, file.entry(slot.up).dtype}
        strange = sorted(dtypes.difference(FLOATS))
        if strange:
            raise UserError(f"{file.path.name}: {path} has the dtype {strange[0]}, which no LoRA has.")
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        scale = _scale(file, slot)
        # A scale that is a power of two leaves every digit of a float as it is; any other needs float32.
        exact = math.frexp(scale)[0] == 0.5 and not dtype.startswith("F8")
        specs[path] = Spec(file.entry(slot.down).shape[0], dtype if exact else "F32")
    return Lora(reading.arch, specs, partial(_from_slot, file, reading.slots, specs), file.header.metadata)


def _scale(file: files.TensorFile, slot: dialects.Slot) -> float:
    """alpha / rank; 1 where there is no alpha."""
    if slot.alpha is None:
        return 1.0
    alpha = float(file.tensor(slot.alpha).float().reshape(()))
    if not math.isfinite(alpha) or alpha <= 0:
        raise UserError(f"{file.path.name}: {slot.alpha} is {alpha:g}: the LoRA would do nothing or harm.")
    return alpha / file.entry(slot.down).shape[0]


def _from_slot(
    file: files.TensorFile, slots: Mapping[str, dialects.Slot], specs: Mapping[str, Spec], path: str
) -> Pair:
    slot, dtype = slots[path], files.torch_dtype(specs[path].dtype)
    down, up = file.tensor(slot.down).to(dtype), file.tensor(slot.up)
    if slot.rows:
        up = up[slice(*slot.rows)]
    up, scale = up.to(dtype), _scale(file, slot)
    return down, up if scale == 1 else up * scale


def _scaled(load: Callable[[str], Pair], weight: float, path: str) -> Pair:
    down, up = load(path)
    return down * weight, up


def _cast(load: Callable[[str], Pair], dtype: torch.dtype, path: str) -> Pair:
    down, up = load(path)
    return down.to(dtype), up.to(dtype)


def _plans(lora: Lora, dialect: dialects.Dialect) -> Iterator[files.Plan]:
    """The tensors of a file, in order. Both factors of a module are made when the first is written."""
    for path, spec in lora.specs.items():
        d_out, d_in = lora.arch.modules[path].shape
        pair = _Once(lora, path)
        down, up, alpha = dialect.keys(path)
        if alpha:
            yield files.Plan(alpha, "F32", (), partial(_number, float(spec.rank)))
        yield files.Plan(down, spec.dtype, (spec.rank, d_in), partial(pair.chunks, 0))
        yield files.Plan(up, spec.dtype, (d_out, spec.rank), partial(pair.chunks, 1))


def _number(value: float) -> list[memoryview]:
    import torch

    return [files.bytes_of(torch.tensor(value))]


@dataclass
class _Once:
    """One module's factors, made at the first call and let go after the second."""

    lora: Lora
    path: str
    pair: Pair | None = None

    def chunks(self, factor: int) -> list[memoryview]:
        if self.pair is None:
            self.pair = self.lora[self.path]
        tensor = self.pair[factor]
        if factor == 1:
            self.pair = None
        if not tensor.isfinite().all():
            raise UserError(f"{self.path}: the factors hold NaN or infinity; nothing was written.")
        return [files.bytes_of(tensor.detach().cpu().contiguous())]


def concatenate(parts: Sequence[Lora], scales: Sequence[float]) -> Lora:
    """One LoRA whose update is the sum of scales_i x update_i: down rows and up columns stand side by side.

    Modules keep the order of the first part that has them. Raises UserError where the architectures differ.
    """
    if len(parts) != len(scales) or not parts:
        raise ValueError(f"{len(parts)} parts, {len(scales)} scales")
    first = parts[0]
    for part in parts:
        if part.arch is not first.arch:
            raise UserError(f"A LoRA of {part.arch.title} cannot be joined to one of {first.arch.title}.")
    paths = list(dict.fromkeys(path for part in parts for path in part.specs))
    specs = {}
    for path in paths:
        here = [part.specs[path] for part in parts if path in part.specs]
        dtypes = {spec.dtype for spec in here}
        specs[path] = Spec(sum(spec.rank for spec in here), dtypes.pop() if len(dtypes) == 1 else "F32")
    scaled = [part.scaled(scale) for part, scale in zip(parts, scales, strict=True)]
    return Lora(first.arch, specs, partial(_joined, scaled, specs))


def _joined(parts: Sequence[Lora], specs: Mapping[str, Spec], path: str) -> Pair:
    import torch

    dtype = files.torch_dtype(specs[path].dtype)
    pairs = [part[path] for part in parts if path in part.specs]
    downs, ups = zip(*pairs, strict=True)
    return torch.cat([down.to(dtype) for down in downs]), torch.cat([up.to(dtype) for up in ups], dim=1)
