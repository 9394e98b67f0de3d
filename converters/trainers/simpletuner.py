"""SimpleTuner: diffusers' keys, ``init_lora`` and a list of the layers to train, at the file's rank.

It takes the rank from the file, and trains four kinds of layers unless ``peft_lora_target_modules`` names others. Found
in simpletuner/helpers/models/common.py and training/adapter.py (August 2026).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

from .base import SAVE_STEPS, SAVES, SIDE, STEPS, ModelSupport, Trainer, TrainingStart, named_by_end, target_names
from .script import training_script

FAMILIES: Mapping[str, Mapping[str, object]] = {
    "qwen-image": {"model_family": "qwen_image", "model_flavour": "v1.0", "flow_schedule_shift": 1.73},
    "z-image": {"model_family": "z_image", "model_flavour": "base"},
    "flux2": {"model_family": "flux2", "flow_schedule_shift": 3},
}

FLAVOURS = {"flux2-klein-4b": "klein-4b", "flux2-klein-9b": "klein-9b", "flux2-dev": "dev"}
"""Architecture of the family flux2 -> its name there."""


def _config(start: TrainingStart, *, family: str) -> Mapping[str, str]:
    config = {
        **FAMILIES[family],
        **({"model_flavour": FLAVOURS[start.arch.id]} if start.arch.id in FLAVOURS else {}),
        **({"pretrained_model_name_or_path": start.model} if "folder" in start.bases else {}),
        "model_type": "lora",
        "lora_type": "standard",
        "lora_rank": start.rank,
        "lora_alpha": start.rank,
        "init_lora": start.init.as_posix(),
        "peft_lora_target_modules": target_names(start),
        "data_backend_config": start.beside("dataset.json"),
        "output_dir": f"output/{start.name}",
        "resume_from_checkpoint": "latest",
        "base_model_precision": "int8-quanto",
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "train_batch_size": 1,
        "resolution": SIDE,
        "resolution_type": "pixel_area",
        "optimizer": "adamw_bf16",
        "learning_rate": start.learning_rate,
        "lr_scheduler": "constant",
        "max_train_steps": STEPS,
        "num_train_epochs": 0,
        "checkpoint_step_interval": SAVE_STEPS,
        "checkpoints_total_limit": SAVES,
        "caption_dropout_probability": 0.05,
        "validation_disable": True,
        "report_to": "none",
        "seed": 42,
    }
    places = {
        "CONFIG": start.beside("config.json"),
        "DATA": start.beside("dataset.json"),
        "INIT": start.init.as_posix(),
    }
    return {
        "train.py": training_script(start, "SimpleTuner", places, ["python -m simpletuner.cli train --env $CONFIG"]),
        "config.json": json.dumps(config, indent=1, ensure_ascii=False) + "\n",
        "dataset.json": json.dumps(_dataset(start), indent=1, ensure_ascii=False) + "\n",
    }


def _dataset(start: TrainingStart) -> list[Mapping[str, object]]:
    """Its description of pictures and of the cache of prompts."""
    return [
        {
            "id": start.name,
            "type": "local",
            "dataset_type": "image",
            "instance_data_dir": start.dataset.folder.as_posix(),
            "caption_strategy": "textfile",
            "metadata_backend": "discovery",
            "crop": False,
            "resolution": SIDE,
            "resolution_type": "pixel_area",
            "minimum_image_size": 0,
            "repeats": 0,
            "cache_dir_vae": start.beside("cache/vae"),
        },
        {
            "id": "text-embeds",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": start.beside("cache/text"),
        },
    ]


ATTENTION = r".*\.to_(q|k|v|out\.0)"
SIMPLETUNER = Trainer(
    "simpletuner",
    "SimpleTuner",
    "diffusers",
    {family: ModelSupport(ATTENTION, r".*", partial(_config, family=family), named_by_end) for family in FAMILIES},
    (
        "dataset.json is SimpleTuner's description of your pictures (its documentation: DATALOADER.md).",
        "A run of this folder that is started again goes on from its latest checkpoint.",
    ),
    rate_place=("config.json", "learning_rate"),
    memory={
        "qwen-image": "above 24 GB: for 24 they ask for `int2-quanto` or `nf4-bnb`, and rank 8 or lower; 40 advised",
        "z-image": "16 to 24 GB at rank 16; 10 to 12 with NF4",
    },
    home="simpletuner",
    results="output/{name}/**/pytorch_lora_weights.safetensors",
)
