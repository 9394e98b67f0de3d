"""A stand-in for musubi-tuner's network modules, written from their documented contract: which layers are wrapped
(every Linear of the block classes, by exclude and include patterns that must match a whole name), how they are named,
that the scale is alpha / dim as given when the network is made, and that weights are read without a complaint."""

import ast
import re

import safetensors.torch
import torch

BLOCKS = {"lora_qwen_image": "QwenImageTransformerBlock", "lora_zimage": "ZImageTransformerBlock"}
EXCLUDED = {"lora_qwen_image": r".*(_mod_).*", "lora_zimage": r".*(_modulation|_refiner).*"}


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
            if type(block).__name__ != BLOCKS[kind]:
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
