"""What is written about a LoRA: the metadata inside its file, and the sidecar that a WebUI reads beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from i2l_ext import __version__

_SD_VERSIONS = {("forge-neo", "qwen-image"): "qwen", ("forge-neo", "z-image"): "zit"}

_MODELSPEC = {
    "qwen-image": ("qwen-image/lora", "https://github.com/QwenLM/Qwen-Image"),
    "z-image": ("z-image/lora", "https://github.com/Tongyi-MAI/Z-Image"),
    "mini": ("i2l-mini/lora", "diffusers"),
}
"""Architecture id -> modelspec.architecture, as SwarmUI and (but for the case) musubi-tuner name it, and
modelspec.implementation."""


def sd_version(arch_id: str, host: str | None = None) -> str:
    """The sidecar's ``sd version``. Only Forge Neo ("forge-neo") has values for these models; others get Unknown."""
    return _SD_VERSIONS.get((host or "", arch_id), "Unknown")


def sidecar(
    *,
    description: str = "",
    sd_version: str = "Unknown",
    activation_text: str = "",
    preferred_weight: float = 1.0,
    negative_text: str = "",
    notes: str = "",
) -> dict[str, Any]:
    """What a WebUI reads from NAME.json, under its own keys."""
    return {
        "description": description,
        "sd version": sd_version,
        "activation text": activation_text,
        "preferred weight": preferred_weight,
        "negative text": negative_text,
        "notes": notes,
    }


def lora_metadata(
    stem: str,
    *,
    arch_id: str,
    model: str,
    rank: int,
    alpha: float | None = None,
    images: Sequence[Mapping[str, Any]],
    strength: float = 1.0,
    request: str | None = None,
    heads: str | None = None,
    description: str = "",
    made: datetime | None = None,
) -> dict[str, str]:
    """The metadata of a LoRA file: sd-scripts' names, ModelSpec 1.0.0, and ``i2l.*``: how it was made.

    ``images``: ``sha256`` and ``weight`` of each; anything else, such as a file name, is left out.
    ``alpha``: None where the file has none, which means alpha = rank.
    ``request``: the digest of what was asked for (``pipeline.PreparedMake.digest``).
    ``heads``: the id of heads other than the model's own.
    ``made``: with its time zone; now if not given.
    There is no ss_network_module, since no trainer made the file, and no modelspec.hash_sha256, since the header is
    written before the tensors.
    """
    architecture, implementation = _MODELSPEC[arch_id]
    made = (made or datetime.now(timezone.utc)).astimezone(timezone.utc)
    return {
        "ss_output_name": stem,
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{rank if alpha is None else alpha:g}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": stem,
        "modelspec.description": description,
        "modelspec.date": f"{made:%Y-%m-%dT%H:%M:%SZ}",
        "i2l.version": __version__,
        "i2l.model": model,
        "i2l.strength": f"{strength:g}",
        "i2l.images": json.dumps([{"sha256": one["sha256"], "weight": one["weight"]} for one in images]),
        **({"i2l.request": request} if request else {}),
        **({"i2l.heads": heads} if heads else {}),
    }
