"""diffusion-pipe: diffusers' keys in a folder with one such file, ``init_from_existing``, at the file's rank.

It trains every linear layer of the model's blocks but those that ``exclude_modules`` names, and raises for a key that
has no place, an alpha too. Its Z-Image has ComfyUI's layers, q, k and v as one, which a LoRA of the three does not fit.
Found in models/base.py and train.py (August 2026).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from .base import ModelSupport, Trainer, TrainingStart, missing_kinds, modules_matching, quoted

BLOCKS = r"transformer_blocks\..*"


def _trained(start: TrainingStart) -> list[str]:
    excluded = tuple(f".{kind}" for kind in missing_kinds(start, SUPPORT))
    return [path for path in modules_matching(start.arch, BLOCKS) if not path.endswith(excluded)]


def _config(start: TrainingStart) -> Mapping[str, str]:
    excluded = missing_kinds(start, SUPPORT)
    text = f"""# Starts a LoRA of Qwen-Image with diffusion-pipe. Fill in the paths.
output_dir = {quoted(f"output/{start.name}")}
dataset = "path/to/dataset.toml"

epochs = 100
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 1
save_every_n_epochs = 5
checkpoint_every_n_minutes = 120
activation_checkpointing = true
partition_method = "parameters"
save_dtype = "bfloat16"
caching_batch_size = 8
steps_per_print = 1
blocks_to_swap = 8

[model]
type = "qwen_image"
diffusers_path = "path/to/Qwen-Image"
dtype = "bfloat16"
transformer_dtype = "float8"
timestep_sample_method = "logit_normal"

[adapter]
type = "lora"
rank = {start.rank}
dtype = "bfloat16"
init_from_existing = {quoted(start.init.parent.as_posix())}
exclude_modules = {json.dumps(excluded)}

[optimizer]
type = "adamw_optimi"
lr = 5e-5
betas = [0.9, 0.99]
weight_decay = 0.01
"""
    return {"config.toml": text if excluded else text.replace("exclude_modules = []\n", "")}


SUPPORT = ModelSupport(BLOCKS, BLOCKS, _config, _trained)
DIFFUSION_PIPE = Trainer(
    "diffusion-pipe",
    "diffusion-pipe",
    "diffusers",
    {"qwen-image": SUPPORT},
    "config.toml",
    "deepspeed --num_gpus=1 train.py --deepspeed --config",
    (
        "Leave one safetensors file in this folder: diffusion-pipe loads the folder and stops where there are two.",
        "`--resume_from_checkpoint` goes on from its own checkpoint, which is loaded after the LoRA.",
    ),
    usage="fill in the paths at `dataset` and `diffusers_path`. `{start}` starts the run `{name}`.",
)
