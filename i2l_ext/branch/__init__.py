"""A LoRA on one branch of guidance: its update is added to the outputs of a model's layers, on the rows that want it.

    adapter = adapter_of(transformer, [Path("my_style.safetensors")])
    with adapter.active([Strength(positive=1.0)], [True, False], progress=0.0):
        transformer(...)  # a batch of two: the first row is of the positive branch

Guided generation predicts twice, with the prompt and with the negative prompt. A LoRA that is merged into the weights
changes both predictions. Here no weight is changed, so layers may be quantized, and afterwards nothing is left.
"""

from i2l_ext.branch.adapter import BranchAdapter, adapter_of, check_file, forget_adapter, read_adapter
from i2l_ext.branch.guidance import OPTION, GuidedLoras, follow, unfollow
from i2l_ext.branch.match import LoraMatch, match_lora
from i2l_ext.branch.rows import Strength

__all__ = [
    "OPTION", "BranchAdapter", "GuidedLoras", "LoraMatch", "Strength", "adapter_of", "check_file", "follow",
    "forget_adapter", "match_lora", "read_adapter", "unfollow",
]  # fmt: skip
