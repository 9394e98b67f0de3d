"""diffusers and what is built on its adapters, flymyai-lora-trainer among them: PEFT's own way to set an adapter.

flymyai-lora-trainer loads no LoRA and trains four kinds of layers (train.py): its `add_adapter` is replaced by the
lines written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

from .base import ModelSupport, Trainer, TrainingStart, short_names

PIPELINES = {"qwen-image": "QwenImagePipeline", "z-image": "ZImagePipeline"}


def _script(start: TrainingStart, *, family: str, title: str, name: str) -> Mapping[str, str]:
    pipeline = PIPELINES[family]
    text = f'''"""Starts {title} from an i2L LoRA: call `start(transformer)` in place of its `add_adapter(...)`."""

from diffusers import {pipeline}
from peft import LoraConfig, set_peft_model_state_dict

INIT = {start.quoted("py").init}
RANK = {start.rank}
TARGETS = {json.dumps(short_names(start.kinds))}


def start(transformer, adapter_name="default"):
    """Add the adapter and set it to the init file; raises where a key has no place."""
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), adapter_name=adapter_name)
    loaded = {pipeline}.lora_state_dict(INIT)
    state = {{key.removeprefix("transformer."): value for key, value in loaded.items()}}
    outcome = set_peft_model_state_dict(transformer, state, adapter_name=adapter_name)
    if outcome.unexpected_keys:
        raise RuntimeError(f"not loaded: {{outcome.unexpected_keys[:3]}}")
    print(f"{{len(state) // 2}} modules start from {{INIT}}")
'''
    return {name: text}


ALL = r".*"
ATTENTION = r".*\.(attn|attention)\.to_(q|k|v|out\.0)"
"""What flymyai-lora-trainer and the training examples of diffusers train unless told otherwise."""
DIFFUSERS = Trainer(
    "diffusers",
    "diffusers",
    "diffusers",
    {
        family: ModelSupport(ATTENTION, ALL, partial(_script, family=family, title="a script", name="start.py"))
        for family in PIPELINES
    },
    "start.py",
    ("To use the LoRA without training: `pipe.load_lora_weights(INIT)`.",),
)
FLYMYAI = Trainer(
    "flymyai",
    "flymyai-lora-trainer",
    "diffusers",
    {
        "qwen-image": ModelSupport(
            ATTENTION, ALL, partial(_script, family="qwen-image", title="flymyai-lora-trainer", name="start.py")
        )
    },
    "start.py",
    (
        "In its train.py replace `flux_transformer.add_adapter(lora_config)` by `start(flux_transformer)`, with",
        "`from start import start` at the top and start.py beside it. Set its rank to the file's.",
    ),
)
