"""A stand-in for musubi-tuner's network modules, written from their documented contract: which layers are wrapped
(every Linear of the block classes, by exclude and include patterns that must match a whole name), how they are named,
that the scale is alpha / dim as given when the network is made, that weights are read without a complaint, what its
metadata are taken from, and how its scripts read their arguments (v0.3.4, commit 30c658c)."""

import argparse
import ast
import json
import re
from pathlib import Path

import safetensors.torch
import torch

BLOCKS = {
    "lora_qwen_image": ("QwenImageTransformerBlock",),
    "lora_zimage": ("ZImageTransformerBlock",),
    "lora_flux_2": ("DoubleStreamBlock", "SingleStreamBlock"),
}
EXCLUDED = {
    "lora_qwen_image": r".*(_mod_).*",
    "lora_zimage": r".*(_modulation|_refiner).*",
    "lora_flux_2": r".*(norm).*",
}


class Module(torch.nn.Module):
    def __init__(self, name, linear, dim, alpha, multiplier):
        super().__init__()
        self.lora_name, self.multiplier = name, multiplier
        self.lora_down = torch.nn.Linear(linear.in_features, dim, bias=False)
        self.lora_up = torch.nn.Linear(dim, linear.out_features, bias=False)
        torch.nn.init.kaiming_uniform_(self.lora_down.weight, a=5**0.5)
        torch.nn.init.zeros_(self.lora_up.weight)
        alpha = alpha or dim
        self.scale = alpha / dim
        self.register_buffer("alpha", torch.tensor(alpha))
        self.wrapped = [linear]

    def apply_to(self):
        forward = self.wrapped[0].forward
        self.wrapped[0].forward = lambda x: forward(x) + self.lora_up(self.lora_down(x)) * self.multiplier * self.scale


class Network(torch.nn.Module):
    def __init__(self, kind, unet, dim, alpha, multiplier, exclude, include):
        super().__init__()
        self.unet_loras = []
        for name, block in unet.named_modules():
            if type(block).__name__ not in BLOCKS[kind]:
                continue
            for child, layer in block.named_modules():
                whole = f"{name}.{child}"
                if type(layer).__name__ != "Linear":
                    continue
                out = any(re.fullmatch(pattern, whole) for pattern in exclude)
                if out and not any(re.fullmatch(pattern, whole) for pattern in include):
                    continue
                key = f"lora_unet.{whole}".replace(".", "_")
                self.unet_loras.append(Module(key, layer, dim, alpha, multiplier))

    def apply_to(self, text_encoders, unet, apply_text_encoder=True, apply_unet=True):
        for module in self.unet_loras:
            module.apply_to()
            self.add_module(module.lora_name, module)

    def load_weights(self, file):
        return self.load_state_dict(safetensors.torch.load_file(file), False)


def network_module(kind):
    """The functions of ``networks.<kind>``, as a namespace."""

    def create_arch_network(
        multiplier, network_dim, network_alpha, vae, text_encoders, unet, neuron_dropout=None, **kwargs
    ):
        exclude = [*ast.literal_eval(kwargs.get("exclude_patterns", "[]")), EXCLUDED[kind]]
        include = ast.literal_eval(kwargs.get("include_patterns", "[]"))
        dim = 4 if network_dim is None else network_dim
        alpha = 1.0 if network_alpha is None else network_alpha
        return Network(kind, unet, dim, alpha, multiplier, exclude, include)

    return create_arch_network


PATHS = dict.fromkeys(
    ("dit", "vae", "text_encoder", "network_weights", "network_module", "output_dir", "output_name"), str
)
CHOICES = {
    "mixed_precision": ("no", "fp16", "bf16"),
    "timestep_sampling": ("sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "logsnr"),
    "weighting_scheme": ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none"),
}
NUMBERS = dict.fromkeys(
    ("max_train_epochs", "max_data_loader_n_workers", "seed", "network_dim", "save_every_n_epochs"), int
) | dict.fromkeys(("learning_rate", "discrete_flow_shift", "network_alpha"), float)
FLAGS = ("sdpa", "persistent_data_loader_workers", "gradient_checkpointing")


def parser(script):
    """What a script of musubi-tuner reads its arguments with, as far as we give them, by its file name."""
    made = argparse.ArgumentParser(allow_abbrev=False)
    made.add_argument("--dataset_config", type=Path)
    if script.startswith(("qwen_image", "flux_2")):
        made.add_argument("--model_version")
    options = PATHS | NUMBERS | {"optimizer_type": str}
    if not script.endswith("train_network.py"):
        options = {"vae": str} if script.endswith("cache_latents.py") else {"text_encoder": str, "batch_size": int}
    for name, kind in options.items():
        made.add_argument(f"--{name}", type=kind)
    if script.endswith("train_network.py"):
        made.add_argument("--network_args", nargs="*")
        for name, choices in CHOICES.items():
            made.add_argument(f"--{name}", choices=choices)
        for name in FLAGS:
            made.add_argument(f"--{name}", action="store_true")
    return made


def metadata_of_a_run(module, args, unet):
    """The network that a run builds by ``module``, and what its files' metadata say of it."""
    options = dict(argument.split("=") for argument in args.network_args)
    network = module.create_arch_network(1.0, args.network_dim, args.network_alpha, None, None, unet, None, **options)
    if hasattr(module, "prepare_network"):
        network.prepare_network(args)
    metadata = {
        "ss_network_module": args.network_module,
        "ss_network_dim": args.network_dim,
        "ss_network_alpha": args.network_alpha,
        "ss_network_args": json.dumps(dict(argument.split("=") for argument in args.network_args)),
    }
    return network, {key: str(value) for key, value in metadata.items()}
