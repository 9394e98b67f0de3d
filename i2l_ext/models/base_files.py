"""Finds the base model that a LoRA is trained on: in a hub's cache, as diffusers keeps it, or as single files in the
models folder of a WebUI or of ComfyUI. Only headers are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from re import search

from i2l_ext.converters import bases
from i2l_ext.converters.architectures import Architecture
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.trainers.base import BASE_REPOS, base_repo
from i2l_ext.models.store import INDEX, Folders, shards

SMALLEST = 100 << 20
"""Bytes: smaller files are LoRAs and the like."""

TRAINABLE = frozenset({"BF16", "F16", "F32"})
"""Number formats that every trainer takes for a base model."""

PARTS = ("transformer", "vae", "text_encoder")


@dataclass(frozen=True)
class Mark:
    """What tells a file: a tensor whose name ends in one of ``tensors`` and has the shape ``shape``, and, as other
    models have alike ones, ``path``: a pattern on its name and folders in small letters."""

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    path: str = ""

    def fits(self, file: Path, weights: Mapping[str, bases.Weight]) -> bool:
        named = (weight for name, weight in weights.items() if name.endswith(self.tensors))
        return bool(search(self.path, _where(file))) and any(
            weight.shape == self.shape and weight.dtype in TRAINABLE for weight in named
        )


_EMBEDDING = ("embed_tokens.weight",)
_QWEN3_4B, _QWEN3_8B = (Mark(_EMBEDDING, (151936, width)) for width in (2560, 4096))
_FLUX2_VAE = Mark(("decoder.conv_in.weight",), (512, 32, 3, 3))
MARKS: Mapping[str, Mapping[str, Mark]] = {
    "qwen-image": {
        "vae": Mark(("decoder.conv_in.weight", "decoder.conv1.weight"), (384, 16, 3, 3, 3), r"qwen(?!.*layered)"),
        "text_encoder": Mark(_EMBEDDING, (152064, 3584)),
    },
    "z-image": {
        "vae": Mark(("decoder.conv_in.weight",), (512, 16, 3, 3), r"\bae\b|z.?image|flux"),
        "text_encoder": _QWEN3_4B,
    },
    "flux2-klein-4b": {"vae": _FLUX2_VAE, "text_encoder": _QWEN3_4B},
    "flux2-klein-9b": {"vae": _FLUX2_VAE, "text_encoder": _QWEN3_8B},
}
"""Id or family of an architecture -> the parts of its base model beside the transformer."""

TRANSFORMERS = {"qwen-image": "Qwen-Image", "z-image": "Z-Image"}
"""Family -> the title that `bases.fits` must give: not that of an editing or a distilled model."""

NAMES = {"flux2-klein-4b": r"klein.?base|base.?klein", "flux2-klein-9b": r"klein.?base|base.?klein"}
"""Architecture -> a pattern on the path of its base, whose distilled model has the same layers."""


def find_base(arch: Architecture, more: Sequence[Path] = (), folders: Folders | None = None) -> dict[str, Path]:
    """Where the base model of a LoRA is, as far as it is here: ``folder`` (as diffusers keeps it), ``transformer``,
    ``vae`` and ``text_encoder`` (a file, or the first of its shards). ``more``: further folders to look into.

    What cannot be read is no base model. Nothing is found for a model that no trainer has, such as the miniature.
    """
    if arch.caution or not {arch.id, arch.family} & BASE_REPOS.keys():
        return {}
    folders = folders or Folders.default()
    home = next((home for home in _homes(arch, more, folders) if _is_whole(home) and not _is_other(arch, home)), None)
    found = {"folder": home} if home else {}
    if home:
        return found | {part: min((home / part).glob("*.safetensors")) for part in PARTS}
    for file in _single_files(more, folders):
        if what := _part(arch, file):
            found.setdefault(what, file)
        if len(found) == len(PARTS):
            break
    return found


def _homes(arch: Architecture, more: Sequence[Path], folders: Folders) -> Iterator[Path]:
    repo = base_repo(arch)
    for root in more:
        yield from (root, root / repo, root / repo.partition("/")[2])
    yield from folders.homes(repo, "model_index.json")


def _is_whole(home: Path) -> bool:
    """Whether a folder holds a whole model of diffusers: its index, and for each part the weights, all shards."""
    try:
        return (home / "model_index.json").is_file() and all(map(_has_weights, (home / part for part in PARTS)))
    except (OSError, UserError):
        return False


def _is_other(arch: Architecture, home: Path) -> bool:
    """Whether a folder is known to hold an editing or a distilled model, which has the layers of the base model."""
    wanted = TRANSFORMERS.get(arch.family)
    try:
        title = bases.fits(arch, arch.modules, bases.read_base(home)).base
    except (UserError, OSError):
        return False
    return wanted is not None and title in {known.title for known in bases.BASES} - {wanted}


def _has_weights(folder: Path) -> bool:
    listed = [shard for index in folder.glob(f"*{INDEX}") for shard in shards(index)]
    return any(folder.glob("*.safetensors")) and all(shard.is_file() for shard in listed)


def _single_files(more: Sequence[Path], folders: Folders) -> Iterator[Path]:
    """Files that are large enough, the first of their shards, in the order of their names."""
    here = [file for root in more for file in sorted(root.rglob("*.safetensors"))]
    for file in dict.fromkeys([*here, *folders.loose]):
        try:
            if file.suffix == ".safetensors" and file.stat().st_size >= SMALLEST and _is_first(file):
                yield file
        except OSError:
            continue


def _is_first(file: Path) -> bool:
    return not bases.SHARD.match(file.name) or "-00001-of-" in file.name


def _part(arch: Architecture, file: Path) -> str | None:
    """Which part of the base model of ``arch`` a file is."""
    try:
        base = bases.read_base(file)
    except (UserError, OSError):
        return None
    marks = MARKS.get(arch.id) or MARKS.get(arch.family, {})
    for part, mark in marks.items():
        if mark.fits(file, base.weights):
            return part
    fit = bases.fits(arch, arch.modules, base)
    wanted = TRANSFORMERS.get(arch.family)
    named = search(NAMES.get(arch.id, ""), _where(file)) is not None
    whole = fit.status == "all" and TRAINABLE.issuperset(fit.stored)
    return "transformer" if whole and named and wanted in (None, fit.base) else None


def _where(file: Path) -> str:
    return "/".join(file.parts[-4:]).lower()
