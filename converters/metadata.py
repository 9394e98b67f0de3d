"""The metadata of a LoRA file, updated when the file is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .scales import ADAPTER_METADATA

if TYPE_CHECKING:
    from .lora import Lora

UNTRUE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", ADAPTER_METADATA)
"""Keys that no written file has: hashes of another file's data, and ranks and alphas. Those are in the tensors, where
every program sees them; diffusers refuses a file whose header tells others."""
STALE = (*UNTRUE, "i2l.request")
"""Keys that are dropped from a file's metadata for a file made of it: also the digest of the options that made it."""

MODULES = {
    "qwen-image": "networks.lora_qwen_image", "z-image": "networks.lora_zimage", "flux2": "networks.lora_flux_2",
}  # fmt: skip
"""musubi-tuner's network module, by family: what ``ss_network_module`` names in its files."""

BASE_VERSIONS = {
    "qwen-image": "qwen_image", "z-image": "zimage", "flux2-klein-4b": "flux2_klein_4b",
    "flux2-klein-9b": "flux2_klein_9b", "flux2-dev": "flux2", "hidream-o1": "hidream_o1",
}  # fmt: skip
"""``ss_base_model_version`` by architecture: the field is sd-scripts', the words are ai-toolkit's. SD.Next's cards and
ComfyUI's list of files read the base model from it."""


def updated_metadata(lora: Lora, key_format: str, name: str | None = None, **fields: str) -> dict[str, str]:
    """The metadata of ``lora`` for a file of it in ``key_format`` called ``name`` (a stem; None: unchanged).

    Everything is kept but what would be wrong: rank and alpha become those of the new file (alpha is the rank), the
    old file's name becomes the new one's, hashes of the old data are dropped, and the base model is named where it was
    not. ``fields`` are added under ``i2l.``.
    """
    metadata = true_metadata(lora, {key: value for key, value in lora.metadata.items() if key not in STALE})
    kohya = key_format.startswith("kohya")
    for key in ("ss_network_dim", "ss_network_alpha") if kohya else ():
        metadata[key] = _rank(lora)
    if kohya and lora.arch.family in MODULES:
        metadata.setdefault("ss_network_module", MODULES[lora.arch.family])
    if version := BASE_VERSIONS.get(lora.arch.id):
        metadata.setdefault("ss_base_model_version", version)
    old = metadata.get("ss_output_name")
    if name and old:
        metadata["ss_output_name"] = name
        if metadata.get("modelspec.title") == old:
            metadata["modelspec.title"] = name
    return metadata | {f"i2l.{key}": value for key, value in fields.items()}


def true_metadata(lora: Lora, metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` without what would be untrue in a file of ``lora``, and with its rank, which is also its alpha."""
    ranks = dict.fromkeys({"ss_network_dim", "ss_network_alpha"} & metadata.keys(), _rank(lora))
    return {key: ranks.get(key, value) for key, value in metadata.items() if key not in UNTRUE}


def _rank(lora: Lora) -> str:
    ranks = {spec.rank for spec in lora.specs.values()}
    return str(ranks.pop()) if len(ranks) == 1 else "Dynamic"


def common_metadata(each: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries that are equal in all of several files: what is true of a merge of them."""
    first, *others = each
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
