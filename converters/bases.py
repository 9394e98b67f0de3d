"""Whether a LoRA fits a base model: its modules against the header of a checkpoint, and what is known of the pair.

A checkpoint is one safetensors file, shards, a folder of diffusers, or a GGUF file. No tensor is read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import files, spellings
from .architectures import ARCHITECTURES, Architecture
from .errors import UserError
from .generation import OMNI_SETTINGS, QWEN_SETTINGS, Z_SETTINGS
from .gguf import read_gguf
from .headers import TENSOR_LIMIT, read_json

SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.safetensors\Z")
MOST_SHARDS = 64
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")
"""What may precede a module's name in a checkpoint."""


@dataclass(frozen=True)
class KnownBase:
    """A base model that is told from others of its layers.

    ``name``: pattern on the names of the file and its folders, and on what its metadata say; ``tensor``: pattern on a
    tensor that only it has; ``config``: a field of config.json that only it sets. ``advice``: a line each, with where
    it is known from.
    """

    title: str
    family: str
    name: str = r"\Z\A"
    tensor: str | None = None
    config: str | None = None
    advice: tuple[str, ...] = ()


_EDIT = "A LoRA for pictures from text works on editing models too, better on its own task (LightX2V, issue 26)."
_QWEN, _Z, _OMNI = (
    f"Settings of the authors of i2L: {settings.line}." for settings in (QWEN_SETTINGS, Z_SETTINGS, OMNI_SETTINGS)
)
_BRANCH = "A plain <lora:...> acts on both branches, which differs from their results."

BASES: tuple[KnownBase, ...] = (
    KnownBase(
        "Qwen-Image-Layered", "qwen-image", r"layered", r"addition_t_embedding", "use_additional_t_cond",
        ("It generates several layers of a picture; no LoRA of i2L was made for it.",),
    ),
    KnownBase(
        "Qwen-Image-Edit-2511", "qwen-image", r"edit.?(plus.?)?2511", r"__index_timestep_zero__", "zero_cond_t",
        (_EDIT, "It needs the setting zero_cond_t (DiffSynth-Studio's example)."),
    ),
    KnownBase("Qwen-Image-Edit-2509", "qwen-image", r"edit.?(plus.?)?2509", advice=(_EDIT,)),
    KnownBase("Qwen-Image-Edit", "qwen-image", r"qwen.?image.?edit", advice=(_EDIT,)),
    KnownBase(
        "Qwen-Image-2512", "qwen-image", r"qwen.?image.?2512",
        advice=("A later Qwen-Image with the same layers: i2L's LoRAs were made for the first one.", _QWEN),
    ),
    KnownBase(
        "Qwen-Image, distilled", "qwen-image", r"qwen.*(lightning|distill|turbo)",
        advice=(
            "A distilled base: it runs at cfg 1 in a few steps (DiffSynth-Studio's example), where a LoRA of "
            "Qwen-Image may act stronger or weaker. Use Qwen-Image itself if you can.",
        ),
    ),
    KnownBase("Qwen-Image", "qwen-image", r"qwen.?image", advice=(_QWEN,)),
    KnownBase(
        "Z-Image-Turbo", "z-image", r"z.?image.?turbo|(?<![a-z])zit(?![a-z])",
        advice=(
            "A distilled base: a LoRA of Z-Image works on it in principle, with uncertain effect (DiffSynth-Studio, "
            "issue 1285). Use Z-Image, not Turbo.",
            "It runs at cfg 1: there is no negative branch.",
        ),
    ),
    KnownBase(
        "Z-Image-Omni-Base", "z-image", r"z.?image.?omni", r"siglip_(embedder|refiner)", "siglip_feat_dim",
        (
            "An i2L model of its own is made for it: z-image-omni-base-style.",
            _OMNI,
            _BRANCH,
        ),
    ),
    KnownBase("Z-Image", "z-image", r"z.?image", advice=(_Z, _BRANCH)),
)  # fmt: skip
"""The first that matches answers: a tensor or a setting that only it has counts before a name."""

OTHERS = {
    r"transformer_blocks\.\d+\.img_mlp\.gate_layer\.": "Qwen-Image 2.x, which has other layers than Qwen-Image",
    r"double_blocks\.\d+\.img_mlp\.fc1\.": "HunyuanVideo",
}
"""Pattern of a tensor -> a base of no known architecture."""


class Weight(NamedTuple):
    """A tensor of a checkpoint: the dtype as the file names it, and the shape that is stored."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Base:
    """A checkpoint's header. ``says``: names of its file and folders and texts of its metadata; ``config``: of
    config.json, if it lies beside."""

    path: Path
    weights: Mapping[str, Weight]
    says: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """Whether a LoRA fits a base. ``status``: all, part or nothing; ``fitting``: number of its modules that do.

    ``missing``: modules that the base does not have; ``misfits``: module -> its shape in the base and in the LoRA's
    model. ``stored``: dtypes of the fitting weights -> number; ``base``: title of the base, as far as it is known.
    """

    status: str
    base: str
    fitting: int
    missing: tuple[str, ...]
    misfits: Mapping[str, tuple[tuple[int, ...], tuple[int, int]]]
    stored: Mapping[str, int]
    advice: tuple[str, ...]

    def json(self) -> dict[str, object]:
        """For programs: plain values only."""
        return {
            "status": self.status,
            "title": self.base,
            "fitting": self.fitting,
            "missing": list(self.missing),
            "misfits": {path: {"base": list(has), "lora": list(want)} for path, (has, want) in self.misfits.items()},
            "stored": dict(self.stored),
            "advice": list(self.advice),
        }


def read_base(path: Path) -> Base:
    """The header of a checkpoint, of all its shards. Raises UserError where it is none or cannot be read."""
    folder = path if path.is_dir() else None
    if folder and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if folder:
        parts = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))
        if not parts:
            raise UserError(f"{path.name}: no .safetensors or .gguf file in this folder. Name the base model's folder.")
    else:
        shard = SHARD.match(path.name)
        parts = [path]
        if shard:
            parts = sorted(one for one in path.parent.iterdir() if (m := SHARD.match(one.name)) and m[1] == shard[1])
    if len(parts) > MOST_SHARDS:
        raise UserError(f"{path.name}: {len(parts)} files; a base model has at most {MOST_SHARDS}.")
    weights: dict[str, Weight] = {}
    texts = [part.name for part in (path.resolve(), *list(path.resolve().parents)[:2])]
    for part in parts:
        found, metadata = _read(part)
        weights |= found
        texts += [value for value in metadata.values() if len(value) < 200]
        if len(weights) > TENSOR_LIMIT:
            raise UserError(f"{path.name}: more than {TENSOR_LIMIT} tensors are not read.")
    config = _config((folder or path.parent) / "config.json")
    texts += [str(config.get("_name_or_path", ""))]
    return Base(path, weights, "\n".join(texts).lower(), config)


def _read(path: Path) -> tuple[dict[str, Weight], Mapping[str, str]]:
    if path.suffix.lower() != ".gguf":
        with files.TensorFile(path) as file:
            header = file.header
        return {name: Weight(info.dtype, info.shape) for name, info in header.tensors.items()}, header.metadata
    try:
        tensors, metadata = read_gguf(path)
    except FileNotFoundError:
        raise UserError(f"{path.name}: there is no such file.") from None
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{path.name}: not a usable GGUF file: {error}.") from None
    return {name: Weight(*info) for name, info in tensors.items()}, metadata


def _config(path: Path) -> Mapping[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def fits(arch: Architecture, paths: Iterable[str], base: Base) -> Fit:
    """Whether the modules at ``paths`` of ``arch`` fit a base."""
    found = _modules(arch, base)
    paths = list(paths)
    missing = tuple(path for path in paths if path not in found)
    misfits = {
        path: (found[path].shape, arch.modules[path].shape)
        for path in paths
        if path in found and not found[path].fits(arch.modules[path].shape)
    }
    fitting = [path for path in paths if path in found and path not in misfits]
    status = "all" if len(fitting) == len(paths) else "part" if fitting else "nothing"
    title, advice = _known(arch, base) if fitting else (_other(base), ())
    stored = dict(Counter(found[path].dtype for path in fitting).most_common())
    return Fit(status, title, len(fitting), missing, misfits, stored, advice)


class _Layer(NamedTuple):
    """A module in a checkpoint: how it is stored; its shape, as far as the packing tells; ``total``: of the
    weights, where it tells only that."""

    dtype: str
    shape: tuple[int, ...]
    total: int | None = None

    def fits(self, shape: tuple[int, int]) -> bool:
        return self.shape == shape if self.total is None else self.total == math.prod(shape)


def _modules(arch: Architecture, base: Base) -> dict[str, _Layer]:
    """The modules of ``arch`` that a base has, under whatever prefix it has most of them."""
    names = spellings.layer_names(arch.id)
    candidates = []
    for prefix in PREFIXES:
        found: dict[str, _Layer] = {}
        for name, paths in names.items():
            layer = _layer(prefix + name, base.weights)
            if layer is None:
                continue
            rows = [arch.modules[path].shape[0] for path in paths]
            for path, count in zip(paths, rows, strict=True):
                found.setdefault(path, _part(layer, count, sum(rows)))
        candidates.append(found)
    return max(candidates, key=len)


def _part(layer: _Layer, rows: int, total: int) -> _Layer:
    """One module of a fused layer: a share of its rows, which only fits where all rows together do."""
    if layer.total is not None:
        return layer._replace(total=layer.total * rows // total)
    if len(layer.shape) != 2 or layer.shape[0] != total:
        return layer
    return layer._replace(shape=(rows, layer.shape[1]))


def _layer(name: str, weights: Mapping[str, Weight]) -> _Layer | None:
    """A layer as it was before it was packed. Its shape, or the number of its weights where the packing is flat."""
    if (down := weights.get(name + ".proj_down")) and (up := weights.get(name + ".proj_up")):
        return _Layer("Nunchaku 4 bit", (up.shape[0], down.shape[0]))
    if packed := weights.get(name + ".qweight"):
        if packed.dtype == "I32" and len(packed.shape) == 2:  # AWQ as Nunchaku stores it
            return _Layer("Nunchaku 4 bit", (packed.shape[0] * 4, packed.shape[1] * 2))
        return _Layer("4 bit", packed.shape)
    weight = weights.get(name + ".weight")
    if weight is None:
        return None
    around = [key for key in (f"{name}.weight_scale", f"{name}.scale_weight") if key in weights]
    if weight.dtype == "U8" and len(weight.shape) == 2:
        count = 2 * math.prod(weight.shape)
        if weight.shape[1] == 1:  # bitsandbytes: one column of bytes, two weights each
            return _Layer("4 bit", weight.shape, count)
        if around:  # NVFP4: two weights a byte
            return _Layer("4 bit", (weight.shape[0], 2 * weight.shape[1]))
    return _Layer(f"{weight.dtype}, scaled" if around else weight.dtype, weight.shape)


def _known(arch: Architecture, base: Base) -> tuple[str, tuple[str, ...]]:
    """The title of a base of this architecture, and what is known of the pair."""
    known = [one for one in BASES if one.family == arch.family and not arch.caution]
    for one in known:
        marked = one.tensor and any(re.search(one.tensor, name) for name in base.weights)
        if marked or (one.config and base.config.get(one.config)):
            return one.title, one.advice
    for one in known:
        if re.search(one.name, base.says):
            return one.title, one.advice
    return f"{arch.title}, or a model with its layers", ()


def _other(base: Base) -> str:
    """What a base is that has none of a LoRA's modules at their shapes."""
    for mark, title in OTHERS.items():
        if any(re.search(mark, name) for name in base.weights):
            return title
    share = {
        arch.title: sum(layer.fits(arch.modules[path].shape) for path, layer in _modules(arch, base).items())
        / len(arch.modules)
        for arch in ARCHITECTURES.values()
    }
    title = max(share, key=lambda title: share[title])
    return title if share[title] > 0.5 else "no known model"


def fit_lines(fit: Fit, name: str, modules: int) -> list[str]:
    """The report for a person. ``name``: the base's file; ``modules``: number of the LoRA's."""
    verdict = {"all": "fits", "part": "fits in part", "nothing": "does not fit"}[fit.status]
    stored = ", ".join(f"{dtype} ({count})" for dtype, count in list(fit.stored.items())[:4])
    lines = [f"  base {name}: {fit.base}{f'; {stored}' if stored else ''}"]
    lines.append(f"  {verdict}: {fit.fitting} of {modules} modules")
    for path, (has, want) in list(fit.misfits.items())[:3]:
        lines.append(f"    {path}: the base has {list(has)}, the LoRA is for {list(want)}")
    if fit.missing:
        lines.append(f"    not in the base: {', '.join(fit.missing[:3])}{', …' if len(fit.missing) > 3 else ''}")
    return [*lines, *(f"  {line}" for line in fit.advice)]
