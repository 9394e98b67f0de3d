"""A network module for musubi-tuner: its own network, started from a LoRA or from pictures.

    --network_module i2l_ext.hooks.musubi --network_args "init=my_style.safetensors"
    --network_module i2l_ext.hooks.musubi --network_args "images=folder/" "model=qwen-image-style"

musubi's own module for the model builds the network. This module resizes the LoRA to ``--network_dim``, sets every
module that matches, leaves the others fresh, and makes the scale 1 whatever ``--network_alpha`` is. All other
``--network_args`` are passed to musubi, which then trains as usual.

musubi asks for the network when it has loaded the model. To be told of a slip before that, start its script through
this module: ``python -m i2l_ext.hooks.musubi SCRIPT ARGUMENTS``, or ``accelerate launch ... -m i2l_ext.hooks.musubi``.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path, PurePath
from types import ModuleType
from typing import TYPE_CHECKING, Any

from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.fusing import fuse
from i2l_ext.hooks.network import initialize_network, kohya_modules

if TYPE_CHECKING:
    import torch

NETWORKS = {
    "QwenImageTransformer2DModel": "lora_qwen_image", "ZImageTransformer2DModel": "lora_zimage", "Flux2": "lora_flux_2",
}  # fmt: skip
"""Class of the model -> musubi's network module for it."""
FUSED = "Flux2"
"""The class whose q, k and v are one layer."""

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
    rows. Ends the program with one line where there is no LoRA to start from, where it is of another model, and for a
    wrong seed: musubi would show a traceback.
    """
    try:
        lora, fresh_seed = opened(init, images, model, seed)
        own = _network(unet)
        dim = network_dim or (fuse(lora) if type(unet).__name__ == FUSED else lora).rank
        if any("_refiner" in path for path in lora):
            kwargs.setdefault("include_patterns", REFINERS)
        network = own.create_arch_network(
            multiplier, dim, float(dim), vae, text_encoders, unet, neuron_dropout=neuron_dropout, **kwargs
        )
        report = initialize_network(kohya_modules(network.unet_loras), lora, seed=fresh_seed)
    except UserError as error:
        raise SystemExit(f"i2l: {error}") from None
    network.prepare_network = partial(prepare_network, rank=dim, module=f"networks.{NETWORKS[type(unet).__name__]}")
    print(f"{report}; alpha is the rank, {dim}", flush=True)
    return network


def prepare_network(args: argparse.Namespace, *, rank: int, module: str) -> None:
    """Make musubi's options say what the network is, so that the metadata of its files do: rank, alpha, the network
    module that reads them, and where it started, without the folder. musubi calls this of the network where its module
    has it too."""
    args.network_module, args.network_dim, args.network_alpha = module, rank, float(rank)
    named = (given.partition("=") for given in args.network_args)
    args.network_args = [
        f"{key}={PurePath(value).name if key in ('init', 'images') else value}" for key, _, value in named
    ]


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
        raise UserError(f"The model is a {kind}; an i2L LoRA can start {', '.join(NETWORKS)}.")
    for package in ("musubi_tuner.networks", "networks"):
        name = f"{package}.{NETWORKS[kind]}"
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # something that musubi itself needs is missing
    raise UserError("musubi-tuner was not found: this module runs inside its training script.")


_kept: dict[tuple[str | None, ...], Lora] = {}
"""What `main` has opened before musubi's script runs: by init, images and model."""


def opened(init: str | None, images: str | None, model: str | None, seed: str = "0") -> tuple[Lora, int]:
    """The LoRA to start from, and the seed as a number. Raises UserError, which names what was asked for."""
    if not (seed.isascii() and seed.isdigit()):
        raise UserError(f"seed must be a whole number of 0 or greater, not {seed!r}.", "out_of_range")
    if bool(init) == bool(images):
        raise UserError('Say what to start from: --network_args "init=my_style.safetensors", or "images=folder/".')
    key = (init, images, model)
    try:
        lora = _kept.pop(key, None) or (Lora.read(init) if init else make_in_memory(Path(images or ""), model))
    except UserError as error:
        raise UserError(f"{'init' if init else 'images'}={init or images}: {error}", error.code) from None
    return lora, int(seed)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Open or make the LoRA that ``--network_args`` name, then run musubi's script, as its own program.

    ``arguments``: the script and its arguments, those of the command line unless given. Ends the program with one line
    where there is nothing to start from.
    """
    parser = argparse.ArgumentParser(prog="python -m i2l_ext.hooks.musubi", add_help=False, allow_abbrev=False)
    parser.add_argument("script")
    parser.add_argument("--network_args", nargs="*", default=[])
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    given, _ = parser.parse_known_args(words)
    asked: Mapping[str, str] = dict(argument.partition("=")[::2] for argument in given.network_args)
    try:
        lora, _ = opened(asked.get("init"), asked.get("images"), asked.get("model"), asked.get("seed", "0"))
    except UserError as error:
        raise SystemExit(f"i2l: {error}") from None
    _kept[asked.get("init"), asked.get("images"), asked.get("model")] = lora
    sys.argv = words
    sys.path.insert(0, str(Path(given.script).resolve().parent))
    runpy.run_path(given.script, run_name="__main__")


if __name__ == "__main__":
    import_module("i2l_ext.hooks.musubi").main()  # the module that musubi will import, with what is kept
