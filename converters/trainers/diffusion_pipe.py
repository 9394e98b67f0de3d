"""diffusion-pipe: webui keys in a folder with one such file, ``init_from_existing``, at the file's rank.

It trains every linear layer of the model's blocks but those that ``exclude_modules`` names, and raises for a key that
has no place, an alpha too. Z-Image and FLUX.2 are ComfyUI's classes there, with q, k and v as one layer, and are read
from the single files that ComfyUI reads. Found in models/base.py, models/z_image.py, models/flux2.py and train.py
(August 2026).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from .base import SAVES, SIDE, ModelSupport, Trainer, TrainingStart, missing_kinds, modules_matching, quoted
from .script import training_script

EPOCHS = 50
FAMILIES = {
    "qwen-image": ("qwen_image", r"transformer_blocks\..*", "", ""),
    "z-image": ("z_image", r"(layers|context_refiner|noise_refiner)\..*", "lumina2", ""),
    "flux2": ("flux2", r"(double_blocks|single_blocks)\..*", "flux2", "shift = 3\n"),
}
"""Family -> its name there, the layers that are trained, the type of its text encoder where it is read as ComfyUI does,
and how timesteps are moved as its guide advises."""


def _trained(start: TrainingStart, *, family: str) -> list[str]:
    excluded = tuple(f".{kind}" for kind in missing_kinds(start, MODELS[family]))
    return [path for path in modules_matching(start.arch, FAMILIES[family][1]) if not path.endswith(excluded)]


def _config(start: TrainingStart, *, family: str) -> Mapping[str, str]:
    excluded = missing_kinds(start, MODELS[family])
    name, _, encoder, shift = FAMILIES[family]
    fast = "diffusion_model_dtype" if encoder else "transformer_dtype"
    text = f"""# Starts a LoRA of {start.arch.title} with diffusion-pipe.
output_dir = {quoted(f"output/{start.name}")}
dataset = {quoted(start.beside("dataset.toml"))}

epochs = {EPOCHS}
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 1
save_every_n_epochs = {EPOCHS // SAVES}
checkpoint_every_n_minutes = 120
activation_checkpointing = true
partition_method = "parameters"
save_dtype = "bfloat16"
caching_batch_size = 8
steps_per_print = 1
blocks_to_swap = 8

[model]
type = "{name}"
{_comfy_base(start, encoder) if encoder else _base(start)}
dtype = "bfloat16"
{fast} = "float8"
timestep_sample_method = "logit_normal"
{shift}
[adapter]
type = "lora"
rank = {start.rank}
dtype = "bfloat16"
init_from_existing = {quoted(start.init.parent.as_posix())}
exclude_modules = {json.dumps(excluded)}

[optimizer]
type = "adamw_optimi"
lr = {start.learning_rate}
betas = [0.9, 0.99]
weight_decay = 0.01
"""
    places = {
        "CONFIG": start.beside("config.toml"),
        "DATA": start.beside("dataset.toml"),
        "INIT": start.init.as_posix(),
    }
    command = "python -m deepspeed.launcher.runner --num_gpus=1 train.py --deepspeed --config $CONFIG"
    return {
        "train.py": training_script(start, "diffusion-pipe", places, [command]),
        "config.toml": text if excluded else text.replace("exclude_modules = []\n", ""),
        "dataset.toml": f"""resolutions = [{SIDE}]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 7
skip_empty_caption = false

[[directory]]
path = {quoted(start.dataset.folder.as_posix())}
num_repeats = {start.dataset.repeats(EPOCHS)}{start.dataset.repeats_comment(EPOCHS)}
""",
    }


def _base(start: TrainingStart) -> str:
    """The base model: a folder of diffusers, or a file for each part."""
    parts = ("transformer", "text_encoder", "vae")
    if "folder" not in start.bases and all(part in start.bases for part in parts):
        return "\n".join(f"{part}_path = {quoted(start.bases[part].as_posix())}" for part in parts)
    return f"diffusers_path = {quoted(start.base('folder', 'Qwen-Image'))}"


def _comfy_base(start: TrainingStart, encoder: str) -> str:
    """The base model in single files, as ComfyUI reads them. A folder of diffusers has none such."""
    if "folder" in start.bases:
        start = replace(start, bases={})
    places = {part: quoted(start.base(part, f"{part}.safetensors")) for part in ("transformer", "vae", "text_encoder")}
    return f"""diffusion_model = {places["transformer"]}
vae = {places["vae"]}
text_encoders = [{{path = {places["text_encoder"]}, type = "{encoder}"}}]"""


MODELS = {
    family: ModelSupport(
        blocks,
        blocks,
        partial(_config, family=family),
        partial(_trained, family=family),
        fused=bool(encoder),
        fresh_rate=5e-5,
    )
    for family, (_, blocks, encoder, _) in FAMILIES.items()
}
DIFFUSION_PIPE = Trainer(
    "diffusion-pipe",
    "diffusion-pipe",
    "webui",
    MODELS,
    (
        "Leave one safetensors file in this folder: diffusion-pipe loads the folder and stops where there are two.",
        "`--resume_from_checkpoint` goes on from its own checkpoint, which is loaded after the LoRA.",
    ),
    downloads=False,
    rate_place=("config.toml", "lr"),
    memory={"qwen-image": "24 GB at 640 x 640; more swapped for 1024 (`blocks_to_swap`)"},
    home="utils/dataset.py",
    results="output/{name}/**/adapter_model.safetensors",
)
