"""DiffSynth-Studio: its own keys, ``--lora_checkpoint`` and a pattern of the layers to train.

It counts the keys of the file, not those that it loads; one line tells of a mismatch. It splits the layers' names at
commas and takes one name alone for a regular expression. Found in training_module.py and parsers.py of its package
diffsynth.diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from .base import ModelSupport, Trainer, TrainingStart, matching_targets, target_pattern
from .script import LAUNCH, training_script

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
    places = {
        "DATASET": "path/to/dataset",
        "METADATA": "path/to/dataset/metadata.csv",
        "INIT": start.init.as_posix(),
    }
    command = f"""{LAUNCH} examples/{folder}/model_training/train.py
        --dataset_base_path $DATASET --dataset_metadata_path $METADATA --dataset_repeat 50 --max_pixels 1048576
        --model_id_with_origin_paths {models}
        --learning_rate 1e-4 --num_epochs 5 --remove_prefix_in_ckpt pipe.dit. --output_path models/train/{start.name}
        --lora_base_model dit --lora_target_modules {target_pattern(start)}
        --lora_rank {start.rank} --lora_checkpoint $INIT --use_gradient_checkpointing --find_unused_parameters"""
    return {"train.py": training_script("DiffSynth-Studio", places, [command])}


BLOCKS = r"(transformer_blocks|layers|context_refiner|noise_refiner)\..*"
EXAMPLE = (
    r"transformer_blocks\.(?!.*mlp\.net\.0).*|(layers|context_refiner|noise_refiner)\.\d+\.(attention|feed_forward)\..*"
)
"""What the training examples of DiffSynth-Studio name as targets."""
MODELS = {
    family: ModelSupport(
        EXAMPLE,
        BLOCKS,
        partial(_script, family=family),
        matching_targets,
    )
    for family in EXAMPLES
}

DIFFSYNTH = Trainer(
    "diffsynth",
    "DiffSynth-Studio",
    "diffsynth",
    MODELS,
    "train.py",
    "python",
    (
        "If the log says `Warning, LoRA key mismatch!`, what it lists was not loaded. `Total N keys` tells nothing: it",
        "counts the keys of the file. `--dataset_repeat` is how often an epoch shows each picture: 8 make 2000 steps.",
    ),
)
