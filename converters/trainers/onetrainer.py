"""OneTrainer: diffusers' keys, ``lora_model_name`` and a filter of the layers that chooses exactly those in the file.

It raises where the filter chooses a layer that the file does not have. It splits the filter at commas. Found in
modules/module/LoRAModule.py and modules/util/config/TrainConfig.py (August 2026).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

from .base import SAVES, SIDE, STEPS, ModelSupport, Trainer, TrainingStart, modules_matching, target_pattern
from .script import training_script

FAMILIES = {
    "qwen-image": ("QWEN", "transformer_block", r"transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)\..*"),
    "z-image": ("Z_IMAGE", "layers", r"layers\.\d+\.(attention|feed_forward)\..*"),
    "flux2": ("FLUX_2", "transformer_block", r"(single_)?transformer_blocks\..*"),
}
"""Family -> its name there, the layers to quantize and those that the presets train."""

CONFIG_VERSION, CONCEPT_VERSION = 11, 2
"""Of the formats of TrainConfig and ConceptConfig: without them every migration since the first would run."""

EPOCHS = 50


def _config(start: TrainingStart, *, family: str) -> Mapping[str, str]:
    kind, quantized, _ = FAMILIES[family]
    frozen = {"train": False, "weight_dtype": "FLOAT_8"}
    config = {
        "__version": CONFIG_VERSION,
        "training_method": "LORA",
        "model_type": kind,
        "base_model_name": start.model,
        "lora_model_name": start.init.as_posix(),
        "lora_rank": start.rank,
        "lora_alpha": float(start.rank),
        "layer_filter": f"^({target_pattern(start, exact=True)})$",
        "layer_filter_preset": "custom",
        "layer_filter_regex": True,
        "workspace_dir": f"workspace/{start.name}",
        "cache_dir": f"workspace-cache/{start.name}",
        "output_model_format": "DIFFUSERS_LORA",
        "output_model_destination": f"models/{start.name}.safetensors",
        "concept_file_name": start.beside("concepts.json"),
        "resolution": str(SIDE),
        "batch_size": 1,
        "epochs": EPOCHS,
        "save_every": EPOCHS // SAVES,
        "save_every_unit": "EPOCH",
        "learning_rate": start.learning_rate,
        "timestep_distribution": "LOGIT_NORMAL",
        **({"dynamic_timestep_shifting": True} if family == "flux2" else {}),
        "transformer": {"train": True, "weight_dtype": "FLOAT_8"},
        "text_encoder": frozen,
        "vae": {"weight_dtype": "FLOAT_32"},
        "quantization": {"layer_filter": quantized, "layer_filter_preset": "blocks"},
        "train_dtype": "BFLOAT_16",
        "weight_dtype": "BFLOAT_16",
        "output_dtype": "BFLOAT_16",
    }
    concept = {
        "__version": CONCEPT_VERSION,
        "name": start.name,
        "path": start.dataset.folder.as_posix(),
        "type": "STANDARD",
        "text": {"prompt_source": "sample"},
        "balancing": float(start.dataset.repeats(EPOCHS)),
        "balancing_strategy": "REPEATS",
    }
    places = {
        "CONFIG": start.beside("config.json"),
        "DATA": start.beside("concepts.json"),
        "INIT": start.init.as_posix(),
    }
    return {
        "train.py": training_script(start, "OneTrainer", places, ["python scripts/train.py --config-path $CONFIG"]),
        "config.json": json.dumps(config, indent=1, ensure_ascii=False) + "\n",
        "concepts.json": json.dumps([concept], indent=1, ensure_ascii=False) + "\n",
    }


ONETRAINER = Trainer(
    "onetrainer",
    "OneTrainer",
    "diffusers",
    {
        family: ModelSupport(
            trained,
            r".*",
            partial(_config, family=family),
            lambda start: modules_matching(start.arch, target_pattern(start, exact=True)),
        )
        for family, (_, _, trained) in FAMILIES.items()
    },
    (
        "config.json can also be loaded in OneTrainer's window; concepts.json is its list of your pictures, and "
        f"`balancing` there {STEPS} steps / ({EPOCHS} epochs x your pictures).",
        "`layer_filter` must stay: OneTrainer stops where it chooses a layer that is not in the file.",
        f"On its way it saves to `workspace` every {EPOCHS // SAVES} epochs.",
        "To resume, set `continue_last_backup` to true: OneTrainer then takes its backup and not the LoRA.",
    ),
    rate_place=("config.json", "learning_rate"),
    memory={
        "qwen-image": "24 GB at 512 x 512, batch 2, a tenth offloaded",
        "z-image": "16 GB at 512 x 512, batch 2; 8 with 0.6 offloaded",
        "flux2": "16 GB for klein base 9B at 512 x 512; 8 offloaded",
    },
    home="scripts/train.py",
    results="models/{name}.safetensors",
)
