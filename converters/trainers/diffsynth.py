"""DiffSynth-Studio: its own keys, ``--lora_checkpoint`` and a pattern of the layers to train.

It counts the keys of the file, not those that it loads; one line tells of a mismatch. It splits the layers' names at
commas and takes one name alone for a regular expression. Found in training_module.py and parsers.py of its package
diffsynth.diffusion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

from .base import SAVES, SIDE, STEPS, ModelSupport, Trainer, TrainingStart, base_repo, matching_targets, target_pattern
from .script import LAUNCH, training_script

EPOCHS = SAVES

EXAMPLES = {
    "qwen-image": "qwen_image", "z-image": "z_image", "flux2": "flux2", "hidream-o1": "hidream_o1_image",
}  # fmt: skip
"""Family -> the folder of its example, whose script trains."""

SIDES = {"hidream-o1": 2048}
"""Family -> the side of a square that has as many pixels as its example trains at, where that is not `SIDE`."""

PARTS = {
    "transformer": "transformer/*.safetensors",
    "text_encoder": "text_encoder/*.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
"""The parts of a base model, as files of its repository."""


def _model(start: TrainingStart, family: str) -> tuple[dict[str, str], str]:
    """Where the base model is: texts for the top of train.py, and the options that use them."""
    repo = base_repo(start.arch)
    if family == "hidream-o1":  # one model that is its own encoder and has no VAE
        return (
            {"MODELS": f"{repo}:model-*.safetensors", "PROCESSOR": f"{repo}:./"},
            "--model_id_with_origin_paths $MODELS --processor_config $PROCESSOR --noise_scale 8.0",
        )
    rest = repo.replace("klein-base", "klein")  # the distilled model has the same encoder and VAE
    named = [f"{repo if part == 'transformer' else rest}:{files}" for part, files in PARTS.items()]
    values = {"MODELS": ",".join(named), "TOKENIZER": f"{rest}:tokenizer/"}
    chosen = "--model_id_with_origin_paths $MODELS"
    if home := start.bases.get("folder"):
        models = [sorted(file.as_posix() for file in home.glob(files)) for files in PARTS.values()]
        values = {"MODELS": json.dumps(models), "TOKENIZER": (home / "tokenizer").as_posix()}
        chosen = "--model_paths $MODELS"
    if home or family == "flux2":  # whose script would take that of FLUX.2 dev
        return values, f"{chosen} --tokenizer_path $TOKENIZER"
    return {"MODELS": values["MODELS"]}, chosen


def _script(start: TrainingStart, *, family: str) -> Mapping[str, str]:
    data = start.dataset
    places = {
        "DATASET": data.folder.as_posix(),
        "METADATA": start.beside("metadata.json") if data.names else (data.folder / "metadata.csv").as_posix(),
        "INIT": start.init.as_posix(),
    }
    values, chosen = _model(start, family)
    side = SIDES.get(family, SIDE)
    command = f"""{LAUNCH} examples/{EXAMPLES[family]}/model_training/train.py
        --dataset_base_path $DATASET --dataset_metadata_path $METADATA --dataset_repeat {data.repeats(EPOCHS)}
        --max_pixels {side * side} {chosen}
        --learning_rate {start.learning_rate} --num_epochs {EPOCHS} --remove_prefix_in_ckpt pipe.dit.
        --output_path models/train/{start.name}
        --lora_base_model dit --lora_target_modules {target_pattern(start)}
        --lora_rank {start.rank} --lora_checkpoint $INIT --use_gradient_checkpointing --find_unused_parameters"""
    texts = {"train.py": training_script(start, "DiffSynth-Studio", places, [command], values)}
    if data.names:
        rows = [{"image": name, "prompt": data.prompt(name)} for name in data.names]
        texts["metadata.json"] = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    return texts


BLOCKS = (
    r"(transformer_blocks|single_transformer_blocks|layers|context_refiner|noise_refiner"
    r"|model\.language_model\.layers|model\.visual\.blocks)\..*"
)
EXAMPLE = (
    r"(single_)?transformer_blocks\.(?!.*mlp\.net\.0).*"
    r"|(layers|context_refiner|noise_refiner)\.\d+\.(attention|feed_forward)\..*"
    r"|model\.(language_model\.layers|visual\.blocks)\..*"
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
    (
        "If the log says `Warning, LoRA key mismatch!`, what it lists was not loaded. `Total N keys` tells nothing: it",
        "counts the keys of the file. `--dataset_repeat` is how often an epoch shows each picture: "
        f"{STEPS} steps / ({EPOCHS} epochs x your pictures).",
    ),
    home="examples/qwen_image/model_training",
    results="models/train/{name}/*.safetensors",
)
