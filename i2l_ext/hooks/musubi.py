"""A network module for musubi-tuner: its own network, started from a LoRA or from pictures.

    --network_module i2l_ext.hooks.musubi --network_args "init=my_style.safetensors"
    --network_module i2l_ext.hooks.musubi --network_args "images=folder/" "model=qwen-image-style"

musubi's own module for the model builds the network. This module resizes the LoRA to ``--network_dim``, sets every
module that matches, leaves the others fresh, and makes the scale 1 whatever ``--network_alpha`` is. All other
``--network_args`` are passed to musubi, which then trains as usual.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from i2l_ext.converters import Lora, UserError
from i2l_ext.hooks.network import initialize_network, kohya_modules

if TYPE_CHECKING:
    import torch

NETWORKS = {"QwenImageTransformer2DModel": "lora_qwen_image", "ZImageTransformer2DModel": "lora_zimage"}
"""Class of the model -> musubi's network module for it."""

REFINERS = "['.*_refiner.*(attention|feed_forward).*']"
"""musubi leaves out Z-Image's refiners by default. They are included where the LoRA has them."""


def create_arch_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: torch.nn.Module,
    text_encoders: list[torch.nn.Module] | None,
    unet: torch.nn.Module,
    neuron_dropout: float | None = None,
    *,
    init: str | None = None,
    images: str | None = None,
    model: str | None = None,
    seed: str = "0",
    **kwargs: Any,
) -> torch.nn.Module:
    """The network that musubi trains; musubi calls this. ``network_dim`` None: the LoRA's rank.

    Either ``init``, a LoRA file, or ``images``, a folder of pictures from which ``model`` makes one. ``seed``: of fresh
    rows. Raises UserError where there is no LoRA to start from, where it is of another model, and for a wrong seed.
    """
    fresh_seed = _parse_seed(seed)
    lora = _open_lora(init, images, model)
    dim = network_dim or lora.rank
    if any("_refiner" in path for path in lora):
        kwargs.setdefault("include_patterns", REFINERS)
    network = _network(unet).create_arch_network(
        multiplier, dim, float(dim), vae, text_encoders, unet, neuron_dropout=neuron_dropout, **kwargs
    )
    report = initialize_network(kohya_modules(network.unet_loras), lora, seed=fresh_seed)
    alpha = "" if network_alpha in (None, dim) else f", --network_alpha {network_alpha:g} is taken as {dim}"
    print(f"{report}{alpha}", flush=True)
    return network


def create_arch_network_from_weights(
    multiplier: float,
    weights_sd: dict[str, torch.Tensor],
    text_encoders: list[torch.nn.Module] | None = None,
    unet: torch.nn.Module | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> torch.nn.Module:
    """musubi calls this to merge ``--base_weights``. Its own module does it, unchanged."""
    module = _network(unet)
    return module.create_arch_network_from_weights(multiplier, weights_sd, text_encoders, unet, for_inference, **kwargs)


def _network(unet: torch.nn.Module | None) -> ModuleType:
    """musubi's own network module for the model, from the installed package or from its folder on the path.

    Raises UserError for another model, or where musubi is not there.
    """
    kind = type(unet).__name__
    if kind not in NETWORKS:
        raise UserError(f"The model is a {kind}; an i2L LoRA can start {' and '.join(NETWORKS)}.")
    for package in ("musubi_tuner.networks", "networks"):
        name = f"{package}.{NETWORKS[kind]}"
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # something that musubi itself needs is missing
    raise UserError("musubi-tuner was not found: this module runs inside its training script.")


def _parse_seed(text: str) -> int:
    """Raises UserError where it is not a whole number of 0 or greater."""
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"seed must be a whole number of 0 or greater, not {text!r}.", "out_of_range")
    return int(text)


def _open_lora(init: str | None, images: str | None, model: str | None) -> Lora:
    if bool(init) == bool(images):
        raise UserError('Say what to start from: --network_args "init=my_style.safetensors", or "images=folder/".')
    return Lora.read(init) if init else make_in_memory(Path(images or ""), model)


def make_in_memory(images: Path, model: str | None) -> Lora:
    """A LoRA made from the pictures in a folder, as `i2l make` does, with its factors in memory.

    ``model`` None: the first that is downloaded, else the built-in test model. Raises UserError where there are no
    pictures or the model's files are missing.
    """
    import tempfile

    from i2l_ext.operations import Context
    from i2l_ext.operations.bars import bars
    from i2l_ext.operations.make import make_lora
    from i2l_ext.requests import EngineOptions, MakeRequest

    with tempfile.TemporaryDirectory() as folder, bars() as reporter:
        context = Context(EngineOptions(cache_bytes=0), reporter)
        lora = Lora.read(make_lora(MakeRequest((images,), "start", Path(folder), model), context).file)
        factors = {path: lora[path] for path in lora}
        lora.read_from.file.close()
    return Lora.of(lora.arch, factors, lora.metadata)
