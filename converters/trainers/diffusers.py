"""diffusers and what is built on its adapters, flymyai-lora-trainer among them: PEFT's own way to set an adapter.

flymyai-lora-trainer loads no LoRA and trains four kinds of layers (train.py): its `add_adapter` is replaced by the
lines written here. Both start a fresh LoRA with `init_lora_weights="gaussian"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from .base import ModelSupport, Trainer, TrainingStart, matching_targets, target_pattern

FAMILIES = {"qwen-image": "QwenImageTransformer2DModel", "z-image": "ZImageTransformer2DModel"}


def _module(start: TrainingStart, *, family: str, title: str) -> Mapping[str, str]:
    text = f'''"""Starts {title} from an i2L LoRA: `from start import start`, then `start(transformer)` in place of
its `add_adapter(...)`. Run by itself, it checks the file."""

from safetensors import safe_open

INIT = {start.init.as_posix()!r}
RANK = {start.rank}
TARGETS = r"{target_pattern(start)}"


def start(transformer, adapter_name="default"):
    """Add the adapter to a {FAMILIES[family]} and set it to the init file; raises where a key has no place."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), adapter_name=adapter_name)
    state = {{key.removeprefix("transformer."): value for key, value in load_file(INIT).items()}}
    outcome = set_peft_model_state_dict(transformer, state, adapter_name=adapter_name)
    if outcome.unexpected_keys:
        raise RuntimeError(f"not loaded: {{outcome.unexpected_keys[:3]}}")
    print(f"{{len(state) // 2}} modules start from {{INIT}}")


if __name__ == "__main__":
    with safe_open(INIT, "np") as file:
        print(f"{{INIT}}: {{len(file.keys()) // 2}} modules of rank {{RANK}}. This module trains nothing by itself.")
    print("In your training script: `from start import start`, `start(transformer)` in place of `add_adapter(...)`.")
'''
    return {"start.py": text}


def _support(family: str, title: str) -> ModelSupport:
    return ModelSupport(
        ATTENTION,
        ALL,
        partial(_module, family=family, title=title),
        matching_targets,
    )


ALL = r".*"
ATTENTION = r".*\.(attn|attention)\.to_(q|k|v|out\.0)"
"""What flymyai-lora-trainer and the training examples of diffusers train unless told otherwise."""
DIFFUSERS = Trainer(
    "diffusers",
    "diffusers",
    "diffusers",
    {family: _support(family, "a training script") for family in FAMILIES},
    "start.py",
    "python",
    (
        "A run that is resumed loads its own checkpoint after that, so it keeps its training.",
        "To use the LoRA without training: `pipe.load_lora_weights(INIT)`.",
    ),
    usage="put it beside your training script, with `from start import start` at the top of that, and replace "
    "`transformer.add_adapter(...)` by `start(transformer)`. `python start.py` checks the file.",
    fresh_rows="gaussian",
)
FLYMYAI = Trainer(
    "flymyai",
    "flymyai-lora-trainer",
    "diffusers",
    {"qwen-image": _support("qwen-image", "flymyai-lora-trainer")},
    "start.py",
    "python",
    (),
    usage="put it beside its train.py, with `from start import start` at the top of that, and replace "
    "`flux_transformer.add_adapter(lora_config)` by `start(flux_transformer)`. `python start.py` checks the file.",
    fresh_rows="gaussian",
)
