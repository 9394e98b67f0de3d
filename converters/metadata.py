"""The metadata of a LoRA file, updated when the file is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .lora import Lora

STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "i2l.request")
"""Keys that are dropped: hashes of the old file's data and of the options it was made with."""

MODULES = {"qwen-image": "networks.lora_qwen_image", "z-image": "networks.lora_zimage"}
"""musubi-tuner's network module, by family: what ``ss_network_module`` names in its files."""


def updated_metadata(lora: Lora, dialect: str, name: str | None = None, **fields: str) -> dict[str, str]:
    """The metadata of ``lora`` for a file of it in ``dialect`` called ``name`` (a stem; None: unchanged).

    Everything is kept but what would be wrong: rank and alpha become those of the new file (alpha is the rank), the
    old file's name becomes the new one's, and hashes of the old data are dropped. ``fields`` are added under
    ``i2l.``.
    """
    metadata = {key: value for key, value in lora.metadata.items() if key not in STALE}
    ranks = {spec.rank for spec in lora.specs.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    kohya = dialect.startswith("kohya")
    for key in ("ss_network_dim", "ss_network_alpha"):
        if kohya or key in metadata:
            metadata[key] = rank
    if kohya and lora.arch.family in MODULES:
        metadata.setdefault("ss_network_module", MODULES[lora.arch.family])
    old = metadata.get("ss_output_name")
    if name and old:
        metadata["ss_output_name"] = name
        if metadata.get("modelspec.title") == old:
            metadata["modelspec.title"] = name
    return metadata | {f"i2l.{key}": value for key, value in fields.items()}


def common_metadata(each: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries that are equal in all of several files: what is true of a merge of them."""
    first, *others = each
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
