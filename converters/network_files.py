"""A LoRA read from a file whose modules are of other networks, and the base model's weights where these need them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import files, keys, networks, spellings
from .architectures import Architecture
from .errors import UserError
from .lora import FLOATS, FactorSpec, FileFactors, Lora
from .threads import usual_threads

if TYPE_CHECKING:
    import torch

    from .lora import Pair
    from .rank import SVD

BASE_FLOATS = ("F64", "F32", "BF16", "F16")
BASE_FOLDERS = (".", "transformer")
"""Where the checkpoint's files may lie in a folder given as base."""


class BaseWeights:
    """The weights of a base model's linear layers: from a checkpoint, or a folder with its safetensors files.

    Raises UserError where it cannot be read.
    """

    def __init__(self, checkpoint: Path | str, arch: Architecture) -> None:
        self.path, self.arch = Path(checkpoint), arch
        found = [self.path]
        if self.path.is_dir():
            found = [one for folder in BASE_FOLDERS for one in sorted((self.path / folder).glob("*.safetensors"))]
        self._files = {name: file for file in map(files.TensorFile, found) for name in file.header.tensors}
        weights = [name for name in self._files if name.endswith(".weight")]
        named = {stem: key for key in weights for _, stem in keys.stems(key.removesuffix(".weight"))}
        self._layers: dict[str, tuple[str, tuple[str, ...]]] = {}
        for name, paths in spellings.layer_names(arch.id).items():
            for path in paths if name in named else ():
                self._layers.setdefault(path, (named[name], paths))

    def _find(self, path: str) -> tuple[files.TensorFile, str, tuple[int, int]]:
        """The file, the key and the rows of a module's weight."""
        if path not in self._layers:
            raise UserError(f"{self.path.name}: holds no weight of {path}. Give a checkpoint of {self.arch.title}.")
        key, paths = self._layers[path]
        info, (d_out, d_in) = self._files[key].info(key), self.arch.modules[path].shape
        heights = [self.arch.modules[part].shape[0] for part in paths]
        start = sum(heights[: paths.index(path)])
        if info.shape != (sum(heights), d_in):
            raise UserError(
                f"{self.path.name}: {key} is {list(info.shape)}, not [{sum(heights)}, {d_in}]: another model."
            )
        if info.dtype not in BASE_FLOATS:
            raise UserError(f"{self.path.name}: {key} is {info.dtype}. Give the base model in bf16, fp16 or fp32.")
        return self._files[key], key, (start, start + d_out)

    def check(self, path: str) -> None:
        """Raises UserError where the module's weight is missing, of another shape or quantized."""
        self._find(path)

    def __getitem__(self, path: str) -> torch.Tensor:
        """The weight of a module, [d_out, d_in], in the file's dtype. Raises UserError as `check`."""
        file, key, rows = self._find(path)
        return file.tensor(key)[slice(*rows)]


@dataclass(frozen=True)
class NetworkFactors(FileFactors):
    """The factors of a file, some of whose modules are of other networks. Those are made exactly, in float32."""

    base: BaseWeights | None = None

    def __call__(self, path: str) -> Pair:
        if path not in self.reading.networks:
            return super().__call__(path)
        network = self.reading.networks[path]
        if network.needs_base:
            return networks.factors("full difference", {"diff": self._difference(path, exact=False)})
        down, up = networks.factors(network.kind, self._parts(path, exact=False))
        return down, up[slice(*network.rows or (None,))] * self.scales[path]

    def raw(self, path: str, factor: int) -> Iterator[memoryview] | None:
        return None if path in self.reading.networks else super().raw(path, factor)

    def svd(self, path: str, rank: int | None, *, exact: bool) -> SVD | None:
        """The decomposition of another network's difference, by the shortest way; None for a plain LoRA."""
        from .rank import SVD, svd_of_product

        network = self.reading.networks.get(path)
        if network is None:
            return None
        if network.kind == "LoKr" and not network.needs_base and not network.rows:
            svd = networks.svd_of_kronecker(self._parts(path, exact), rank, exact=exact)
            return SVD(svd.u, svd.s * self.scales[path], svd.vh)
        if network.needs_base or 2 * self.specs[path].rank > min(self.reading.arch.modules[path].shape):
            with usual_threads():
                return networks.svd_of_matrix(self._difference(path, exact), None if exact else rank)
        return svd_of_product(*self(path), exact=exact)

    def _parts(self, path: str, exact: bool) -> dict[str, torch.Tensor]:
        import torch

        dtype = torch.float64 if exact else torch.float32
        named = {part: key for part, key in self.reading.networks[path].keys.items() if part != "alpha"}
        parts = {part: self.file.tensor(key).to(dtype) for part, key in named.items()}
        if not all(tensor.isfinite().all() for tensor in parts.values()):
            raise UserError(f"{path}: the factors hold NaN or infinity.")
        return parts

    def _difference(self, path: str, exact: bool) -> torch.Tensor:
        """The difference [d_out, d_in] as a matrix, with its scale."""
        network, parts = self.reading.networks[path], self._parts(path, exact)
        rows = slice(*network.rows or (None,))
        update = networks.difference(network.kind, parts)[rows] * self.scales[path]
        if not network.needs_base or self.base is None:
            return update
        magnitude = parts["magnitude"][rows] if network.rows else parts["magnitude"]
        changed = networks.decomposed_difference(self.base[path].to(update), update, magnitude)
        if not changed.isfinite().all():
            raise UserError(f"{self.base.path.name}: the weight of {path} holds NaN or infinity.")
        return changed


def with_networks(plain: FileFactors, base: Path | str | None) -> NetworkFactors:
    """The factors of all modules of a file, with those of other networks. ``base``: the base model's weights, a file or
    a folder.

    Raises UserError where a network needs the base and there is none, or it is of another model.
    """
    file, reading = plain.file, plain.reading
    needing = [path for path, network in reading.networks.items() if network.needs_base]
    if needing and base is None:
        raise UserError(
            f"{file.path.name}: {needing[0]} is {reading.networks[needing[0]].title}, whose change depends on the base "
            "model's weights. `i2l convert` with --base CHECKPOINT and --rank K makes a plain LoRA of it.",
            "needs_base",
        )
    weights = BaseWeights(base, reading.arch) if base is not None and needing else None
    specs = dict(plain.specs)
    for path, network in reading.networks.items():
        if weights and network.needs_base:
            weights.check(path)
        specs[path] = _spec(file, path, network)
    ordered = {path: specs[path] for path in reading.arch.modules if path in specs}
    return NetworkFactors(file, reading, plain.scales, ordered, weights)


def _spec(file: files.TensorFile, path: str, network: networks.Network) -> FactorSpec:
    for part, key in network.keys.items():
        if part != "alpha" and file.info(key).dtype not in FLOATS:
            raise UserError(f"{file.path.name}: {path} has the dtype {file.info(key).dtype}, which no LoRA has.")
    d_out, d_in, rank = networks.size(network.kind, network.shapes(file.header.shapes))
    return FactorSpec(min(d_out, d_in) if network.needs_base else rank, "F32")


def require_small(lora: Lora) -> None:
    """Raises UserError where the exact factors of a module of another network would be larger than its full weight."""
    source = lora.source
    for path, network in source.reading.networks.items() if source else ():
        if source and path in lora.specs and _larger_than_full(lora, path):
            raise UserError(
                f"{source.file.path.name}: {path} is {network.title} of rank {lora.specs[path].rank}: its exact "
                "factors would be larger than the full weight. Say `i2l convert` with --rank K, such as 32: the "
                "nearest LoRA of that rank.",
                "needs_rank",
            )


def _larger_than_full(lora: Lora, path: str) -> bool:
    d_out, d_in = lora.arch.modules[path].shape
    return lora.specs[path].rank * (d_out + d_in) > d_out * d_in
