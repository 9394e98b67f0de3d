"""SimpleTuner: diffusers' keys, ``init_lora`` and a list of the layers to train, at the file's rank.

It takes the rank from the file, and trains four kinds of layers unless ``peft_lora_target_modules`` names others. Found
in simpletuner/helpers/models/common.py and training/adapter.py (August 2026).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

from .base import ModelSupport, Trainer, TrainingStart, named_by_end, target_names

FAMILIES: Mapping[str, Mapping[str, object]] = {
    "qwen-image": {"model_family": "qwen_image", "model_flavour": "v1.0", "flow_schedule_shift": 1.73},
    "z-image": {"model_family": "z_image", "model_flavour": "base"},
}


def _config(start: TrainingStart, *, family: str) -> Mapping[str, str]:
    config = {
        **FAMILIES[family],
        "model_type": "lora",
        "lora_type": "standard",
        "lora_rank": start.rank,
        "lora_alpha": start.rank,
        "init_lora": start.init.as_posix(),
        "peft_lora_target_modules": target_names(start),
        "data_backend_config": "path/to/multidatabackend.json",
        "output_dir": f"output/{start.name}",
        "resume_from_checkpoint": "latest",
        "base_model_precision": "int8-quanto",
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "train_batch_size": 1,
        "resolution": 1024,
        "resolution_type": "pixel_area",
        "optimizer": "adamw_bf16",
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "max_train_steps": 2000,
        "num_train_epochs": 0,
        "checkpoint_step_interval": 250,
        "caption_dropout_probability": 0.05,
        "validation_disable": True,
        "report_to": "none",
        "seed": 42,
    }
    return {"config.json": json.dumps(config, indent=1, ensure_ascii=False) + "\n"}


ATTENTION = r".*\.to_(q|k|v|out\.0)"
SIMPLETUNER = Trainer(
    "simpletuner",
    "SimpleTuner",
    "diffusers",
    {family: ModelSupport(ATTENTION, r".*", partial(_config, family=family), named_by_end) for family in FAMILIES},
    "config.json",
    "simpletuner train --env",
    (
        "`data_backend_config` is SimpleTuner's own description of your pictures (its documentation: DATALOADER.md).",
        "A run of this folder that is started again goes on from its latest checkpoint.",
    ),
    usage="fill in the path at `data_backend_config`. `{start}` starts the run `{name}`.",
)
