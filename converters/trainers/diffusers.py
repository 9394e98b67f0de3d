"""diffusers and what is built on its adapters, flymyai-lora-trainer among them: PEFT's own way to set an adapter.

flymyai-lora-trainer loads no LoRA and trains four kinds of layers (train.py). start.py runs their scripts with the
`add_adapter` of the transformer's class exchanged for its own. diffusers' script opens every file in the folder of
pictures as a picture, so no captions lie there. Both start a fresh LoRA with `init_lora_weights="gaussian"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from .base import (
    SAVE_STEPS,
    SAVES,
    SIDE,
    STEPS,
    ModelSupport,
    Trainer,
    TrainingStart,
    matching_targets,
    quoted,
    target_pattern,
)
from .script import LAUNCH, training_script

FAMILIES = {
    "qwen-image": ("QwenImageTransformer2DModel", "qwen_image"),
    "z-image": ("ZImageTransformer2DModel", "z_image"),
    "flux2": ("Flux2Transformer2DModel", "flux2_klein"),
}
"""Family -> the class of its transformer, and the end of the name of its training script in diffusers."""


def _module(start: TrainingStart, *, family: str, title: str) -> str:
    kind = FAMILIES[family][0]
    return f'''"""Starts {title} from an i2L LoRA: `from start import start`, then `start(transformer)` in place of
its `add_adapter(...)`. `start.py SCRIPT ARGUMENTS` runs a training script so, unchanged; alone it checks the file."""

import runpy
import sys
from pathlib import Path

from safetensors import safe_open

INIT = {start.init.as_posix()!r}
RANK = {start.rank}
TARGETS = r"{target_pattern(start)}"


def start(transformer, adapter_name="default"):
    """Add the adapter to a {kind} and set it to the start folder's LoRA; raises where a key has no place."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), adapter_name=adapter_name)
    state = {{key.removeprefix("transformer."): value for key, value in load_file(INIT).items()}}
    outcome = set_peft_model_state_dict(transformer, state, adapter_name=adapter_name)
    if outcome.unexpected_keys:
        raise RuntimeError(f"not loaded: {{outcome.unexpected_keys[:3]}}")
    print(f"{{len(state) // 2}} modules start from {{INIT}}", flush=True)


def run(script):
    """Run a training script; the first adapter that it adds to its transformer is ours."""
    from diffusers import {kind} as kind

    add_adapter = kind.add_adapter

    def add_ours(transformer, config, adapter_name="default"):
        kind.add_adapter = add_adapter
        start(transformer, adapter_name)

    kind.add_adapter = add_ours
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
    if kind.add_adapter is add_ours:
        sys.exit(f"{{script}} has added no adapter to its transformer: it did not train from {{INIT}}.")


if __name__ == "__main__" and len(sys.argv) > 1:
    del sys.argv[0]
    run(sys.argv[0])
elif __name__ == "__main__":
    with safe_open(INIT, "np") as file:
        print(f"{{INIT}}: {{len(file.keys()) // 2}} modules of rank {{RANK}}. This module trains nothing by itself.")
    print("In your training script: `from start import start`, `start(transformer)` in place of `add_adapter(...)`.")
'''


def _places(start: TrainingStart) -> dict[str, str]:
    return {"START": start.beside("start.py"), "INIT": start.init.as_posix()}


def _diffusers(start: TrainingStart, *, family: str) -> Mapping[str, str]:
    values = {"MODEL": start.model, "PROMPT": start.dataset.caption}
    places = {**_places(start), "DATASET": start.dataset.folder.as_posix()}
    script = "flux2" if start.arch.id == "flux2-dev" else FAMILIES[family][1]
    command = f"""{LAUNCH} --mixed_precision bf16 $START
        examples/dreambooth/train_dreambooth_lora_{script}.py
        --pretrained_model_name_or_path $MODEL --instance_data_dir $DATASET --instance_prompt $PROMPT
        --output_dir output/{start.name} --rank {start.rank} --lora_alpha {start.rank} --resolution {SIDE}
        --train_batch_size 1 --gradient_checkpointing --cache_latents --mixed_precision bf16
        --learning_rate {start.learning_rate} --lr_scheduler constant --lr_warmup_steps 0
        --max_train_steps {STEPS} --checkpointing_steps {SAVE_STEPS}
        --resume_from_checkpoint latest --skip_final_inference --seed 42"""
    return {
        "train.py": training_script(start, "diffusers' training script", places, [command], values),
        "start.py": _module(start, family=family, title="a training script"),
    }


def _flymyai(start: TrainingStart) -> Mapping[str, str]:
    config = f"""pretrained_model_name_or_path: {quoted(start.model)}
data_config:
  train_batch_size: 1
  num_workers: 4
  img_size: {SIDE}
  caption_dropout_rate: 0.1
  img_dir: {quoted(start.dataset.folder.as_posix())}
  random_ratio: false
  caption_type: txt
report_to: null
train_batch_size: 1
output_dir: {quoted(f"output/{start.name}")}
max_train_steps: {STEPS}
learning_rate: {start.learning_rate}
lr_scheduler: constant
lr_warmup_steps: 10
adam_beta1: 0.9
adam_beta2: 0.999
adam_weight_decay: 0.01
adam_epsilon: 1e-8
max_grad_norm: 1.0
logging_dir: logs
mixed_precision: "bf16"
checkpointing_steps: {SAVE_STEPS}
checkpoints_total_limit: {SAVES}
tracker_project_name: i2l
resume_from_checkpoint: latest
gradient_accumulation_steps: 1
rank: {start.rank}
"""
    places = {**_places(start), "CONFIG": start.beside("config.yaml")}
    command = f"{LAUNCH} --mixed_precision bf16 $START train.py --config $CONFIG"
    return {
        "train.py": training_script(start, "flymyai-lora-trainer", places, [command]),
        "start.py": _module(start, family="qwen-image", title="flymyai-lora-trainer"),
        "config.yaml": config,
    }


ALL = r".*"
ATTENTION = r".*\.(attn|attention)\.to_(q|k|v|out\.0|qkv_mlp_proj|out)"
"""What flymyai-lora-trainer and the training examples of diffusers train unless told otherwise."""
DIFFUSERS = Trainer(
    "diffusers",
    "diffusers",
    "diffusers",
    {family: ModelSupport(ATTENTION, ALL, partial(_diffusers, family=family), matching_targets) for family in FAMILIES},
    (
        "A run that is resumed loads its own checkpoint after that, so it keeps its training.",
        "To use the LoRA without training: `pipe.load_lora_weights(INIT)`.",
    ),
    usage="`{start}` runs the training script of diffusers. For a script of your own: `from start import start`, and "
    "`start(transformer)` in place of `transformer.add_adapter(...)`. `python start.py` checks the file.",
    fresh_rows="gaussian",
    captions=False,
    home="examples/dreambooth",
    results="output/{name}/**/pytorch_lora_weights.safetensors",
)
FLYMYAI = Trainer(
    "flymyai",
    "flymyai-lora-trainer",
    "diffusers",
    {"qwen-image": ModelSupport(ATTENTION, ALL, _flymyai, matching_targets)},
    (),
    usage="`{start}` runs its train.py. For a script of your own: `from start import start`, and "
    "`start(flux_transformer)` in place of `flux_transformer.add_adapter(...)`. `python start.py` checks the file.",
    fresh_rows="gaussian",
    rate_place=("config.yaml", "learning_rate"),
    memory={"qwen-image": "not stated; its own quantised script `train_4090.py` is for less than 24 GB"},
    home="image_datasets/dataset.py",
    results="output/{name}/**/pytorch_lora_weights.safetensors",
)
