"""What is written about a LoRA: the metadata inside its file, and the sidecar that a WebUI reads beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from i2l_ext import __version__
from i2l_ext.converters.metadata import BASE_VERSIONS

_SD_VERSIONS = {("forge-neo", "qwen-image"): "qwen", ("forge-neo", "z-image"): "zit"}

_MODELSPEC = {
    "qwen-image": ("qwen-image/lora", "https://github.com/QwenLM/Qwen-Image"),
    "z-image": ("z-image/lora", "https://github.com/Tongyi-MAI/Z-Image"),
    "flux2-klein-4b": ("Flux.2-klein-4b/lora", "https://github.com/black-forest-labs/flux2"),
    "hidream-o1": ("HiDream-O1-Image/lora", "https://github.com/HiDream-ai/HiDream-O1-Image"),
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
    options: Mapping[str, Any] | None = None,
    heads: str | None = None,
    pair: str | None = None,
    description: str = "",
    made: datetime | None = None,
) -> dict[str, str]:
    """The metadata of a LoRA file: sd-scripts' names, ModelSpec 1.0.0, and ``i2l.*``: how it was made.

    ``images``: ``sha256``, ``weight`` and perhaps ``crop`` of each; anything else, such as a file name, is left out.
    ``alpha``: None where the file has none, which means alpha = rank.
    ``request``: the digest of what was asked for (``pipeline.PreparedMake.digest``).
    ``options``: fields of the request by OPTIONS, so that it can be made anew.
    ``heads``: the id of heads other than the model's own.
    ``pair``: the name of the LoRA for the negative branch, if there is one.
    ``made``: with its time zone; now if not given.
    There is no ss_network_module, since no trainer made the file, and no modelspec.hash_sha256, since the header is
    written before the tensors.
    """
    architecture, implementation = _MODELSPEC[arch_id]
    made = (made or datetime.now(timezone.utc)).astimezone(timezone.utc)
    return {
        "ss_output_name": stem,
        **({"ss_base_model_version": BASE_VERSIONS[arch_id]} if arch_id in BASE_VERSIONS else {}),
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
        "i2l.images": json.dumps(
            [{key: one[key] for key in ("sha256", "weight", "crop") if key in one} for one in images]
        ),
        **({"i2l.request": request} if request else {}),
        **({"i2l.options": json.dumps(dict(options))} if options else {}),
        **({"i2l.heads": heads} if heads else {}),
        **({"i2l.grey": pair} if pair else {}),
    }


_OF_IMAGE = ("sha256", "weight", "crop")

OPTIONS = ("key_format", "dtype", "rank", "blocks", "kinds")
"""Fields of the request that a LoRA remembers, beside model, pictures and strength."""


def how_made(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Of a LoRA that i2L has made: ``model``, ``strength``, ``images`` (``sha256`` and ``weight`` of each, and ``crop``
    where it is not the centre) and ``options`` (by OPTIONS). None of another, or where its metadata are damaged."""
    with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        images = [
            {"sha256": str(one["sha256"]), "weight": float(one["weight"]),
             **({"crop": str(one["crop"])} if "crop" in one else {})}
            for one in json.loads(metadata["i2l.images"])
        ]  # fmt: skip
        options = json.loads(metadata.get("i2l.options", "{}"))
        options.setdefault("key_format", options.get("dialect"))  # as builds of November 2026 and older wrote it
        return {
            "model": metadata["i2l.model"], "strength": float(metadata["i2l.strength"]), "images": images,
            "options": {name: options[name] for name in OPTIONS if options.get(name) is not None},
        }  # fmt: skip
    return None
