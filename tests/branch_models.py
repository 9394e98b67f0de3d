"""Small models of random weights with LoRAs for them, for the tests of a LoRA on one branch.

In a file of its own, as several tests use it.
"""

import copy
from contextlib import contextmanager

import torch
from torch import nn

from i2l_ext.converters import Lora, architectures
from i2l_ext.converters.architectures import MINI

TINY_Z = architectures.z_image("tiny-z", "tiny Z-Image", depth=2, refiners=1, hidden=256, mlp=682, text=32)


@contextmanager
def known(arch):
    """A block in which an architecture of the tests can be read from files."""
    architectures.ARCHITECTURES[arch.id] = arch
    try:
        yield arch
    finally:
        del architectures.ARCHITECTURES[arch.id]


def qwen():
    """diffusers' Qwen-Image class at the miniature's size."""
    from diffusers import QwenImageTransformer2DModel

    from i2l_ext.mini.base import TRANSFORMER_CONFIG

    torch.manual_seed(0)
    return QwenImageTransformer2DModel(**TRANSFORMER_CONFIG).eval().requires_grad_(False)


def z_image():
    """diffusers' Z-Image class at the size of TINY_Z."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        dim=256, n_heads=2, n_kv_heads=2, n_layers=2, n_refiner_layers=1, cap_feat_dim=32, axes_dims=[32, 48, 48]
    )
    for parameter in (model.x_pad_token, model.cap_pad_token):
        nn.init.normal_(parameter)
    return model.eval().requires_grad_(False)


def lora_of(arch, rank=4, seed=1, size=0.2, dtype=torch.float32, paths=None):
    """A LoRA of all layers that an i2L model writes, or of ``paths``, that changes a prediction visibly."""
    generator = torch.Generator().manual_seed(seed)

    def pair(path):
        d_out, d_in = arch.modules[path].shape
        return (
            (torch.randn(rank, d_in, generator=generator) * size).to(dtype),
            (torch.randn(d_out, rank, generator=generator) * size).to(dtype),
        )

    return Lora.of(arch, {path: pair(path) for path in paths or arch.i2l_modules})


def merged(model, *weighted):
    """A copy of the model with LoRAs added to its weights: pairs of LoRA and LoRA weight."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for lora, weight in weighted:
            for path in lora:
                layer = model.get_submodule(path)
                layer.weight.copy_((layer.weight.float() + weight * lora.delta(path)).to(layer.weight.dtype))
    return model


def qwen_inputs(rows, tokens=5, seed=3):
    """Arguments of the miniature's transformer for a batch."""
    from i2l_ext.mini.base import TRANSFORMER_CONFIG

    channels, words = TRANSFORMER_CONFIG["in_channels"], TRANSFORMER_CONFIG["joint_attention_dim"]
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(rows, 64, channels, generator=generator),
        "encoder_hidden_states": torch.randn(rows, tokens, words, generator=generator),
        "encoder_hidden_states_mask": torch.ones(rows, tokens, dtype=torch.bool),
        "timestep": torch.full((rows,), 0.7),
        "img_shapes": [[(1, 8, 8)]] * rows,
        "return_dict": False,
    }


def hooks_of(model):
    """Every hook on a model and its layers, and every attribute's name: what a removal must leave as it was."""
    return {
        name: (
            len(layer._forward_hooks),
            len(layer._forward_pre_hooks),
            len(layer._forward_hooks_always_called),
            len(layer._forward_hooks_with_kwargs),
            sorted(layer.__dict__),
        )
        for name, layer in model.named_modules()
    }


class Fused(nn.Module):
    """Layers with the names of Z-Image's first implementation: q, k and v in one."""

    def __init__(self, arch=TINY_Z):
        super().__init__()
        torch.manual_seed(0)
        hidden = arch.modules["layers.0.attention.to_q"].shape[1]
        self.layers = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            block.attention = nn.Module()
            block.attention.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
            block.attention.out = nn.Linear(hidden, hidden, bias=False)
            self.layers.append(block)
        self.requires_grad_(False)

    def forward(self, x):
        for block in self.layers:
            q, k, v = block.attention.qkv(x).chunk(3, dim=-1)
            x = x + block.attention.out(torch.tanh(q) * k + v)
        return x


__all__ = ["MINI", "TINY_Z", "Fused", "hooks_of", "known", "lora_of", "merged", "qwen", "qwen_inputs", "z_image"]
