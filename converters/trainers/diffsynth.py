"""DiffSynth-Studio: its own keys, ``--lora_checkpoint`` and the names of the layers to train.

It prints "loaded" even where nothing matched; the count it prints must be twice the number of modules. Found in
diffsynth/diffusion/training_module.py and parsers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from .base import ModelSupport, Trainer, TrainingStart, short_names

EXAMPLES = {
    "qwen-image": (
        "qwen_image",
        "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,"
        "Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors",
    ),
    "z-image": (
        "z_image",
        "Tongyi-MAI/Z-Image:transformer/*.safetensors,Tongyi-MAI/Z-Image:text_encoder/*.safetensors,"
        "Tongyi-MAI/Z-Image:vae/diffusion_pytorch_model.safetensors",
    ),
}


def _script(start: TrainingStart, *, family: str) -> Mapping[str, str]:
    folder, models = EXAMPLES[family]
    quoted = start.quoted("sh")
    text = f"""#!/bin/sh
# Trains {start.name} with DiffSynth-Studio, starting from {start.init.name}. Run it in DiffSynth-Studio's folder.
set -e
DATASET=path/to/dataset

accelerate launch examples/{folder}/model_training/train.py \\
  --dataset_base_path "$DATASET" --dataset_metadata_path "$DATASET/metadata.csv" --max_pixels 1048576 \\
  --model_id_with_origin_paths "{models}" \\
  --learning_rate 1e-4 --num_epochs 5 --remove_prefix_in_ckpt "pipe.dit." --output_path models/train/{quoted.name} \\
  --lora_base_model dit --lora_target_modules "{",".join(short_names(start.kinds))}" \\
  --lora_rank {start.rank} --lora_checkpoint {quoted.init} \\
  --use_gradient_checkpointing --find_unused_parameters
"""
    return {"train.sh": text}


BLOCKS = r"(transformer_blocks|layers|context_refiner|noise_refiner)\..*"
EXAMPLE = (
    r"transformer_blocks\.(?!.*mlp\.net\.0).*|(layers|context_refiner|noise_refiner)\.\d+\.(attention|feed_forward)\..*"
)
"""What the training examples of DiffSynth-Studio name as targets."""
MODELS = {family: ModelSupport(EXAMPLE, BLOCKS, partial(_script, family=family)) for family in EXAMPLES}

DIFFSYNTH = Trainer(
    "diffsynth",
    "DiffSynth-Studio",
    "diffsynth",
    MODELS,
    "train.sh",
    ("The log must say `LoRA checkpoint loaded. Total N keys` with N twice the number of modules, and no mismatch.",),
)
