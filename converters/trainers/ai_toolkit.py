"""ai-toolkit: webui keys, ``pretrained_lora_path``, and a name of its own for every run.

It takes no notice of alpha (its scale is 1), pads a file of lower rank with zeros in both factors (ranks that can
never learn), and starts from an earlier run of the same name before it looks at the path. Found in
toolkit/network_mixins.py, toolkit/lora_special.py and jobs/process/BaseSDTrainProcess.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

from ..metadata import BASE_VERSIONS
from .base import (
    SAVE_STEPS,
    SAVES,
    SIDE,
    STEPS,
    ModelSupport,
    Trainer,
    TrainingStart,
    base_repo,
    missing_kinds,
    modules_matching,
    quoted,
)
from .script import training_script


def _only(start: TrainingStart) -> list[str]:
    """Pieces of names, one of which every trained module of Z-Image has."""
    groups = {"attention.to_": 4, "feed_forward.w": 3}
    pieces = []
    for piece, count in groups.items():
        kinds = [kind for kind in start.kinds if kind.startswith(piece)]
        pieces += [piece] if len(kinds) == count else kinds
    return pieces + [kind for kind in start.kinds if "adaLN" in kind]


def _ignored(start: TrainingStart, family: str) -> list[str]:
    """Pieces of names that no trained module of Qwen-Image or FLUX.2 has."""
    missing = missing_kinds(start, MODELS[family])
    pair = ["img_mlp.net.0.proj", "txt_mlp.net.0.proj"]
    if all(kind in missing for kind in pair):
        missing = ["mlp.net.0", *(kind for kind in missing if kind not in pair)]
    return missing


def _trained(start: TrainingStart, *, family: str) -> list[str]:
    if family != "z-image":
        ignored = _ignored(start, family)
        return [
            path
            for path in modules_matching(start.arch, MODELS[family].default)
            if not any(piece in path for piece in ignored)
        ]
    only = _only(start)
    return [path for path in start.arch.modules if any(piece in path for piece in only)]


def _config(start: TrainingStart, *, family: str) -> Mapping[str, str]:
    if family != "z-image":
        ignored = _ignored(start, family)
        chosen = [f"network_kwargs: {{ignore_if_contains: {json.dumps(ignored)}}}"] if ignored else []
    else:
        chosen = ["transformer_only: false", f"network_kwargs: {{only_if_contains: {json.dumps(_only(start))}}}"]
    network = "\n        ".join(
        [
            "type: lora",
            f"linear: {start.rank}",
            f"linear_alpha: {start.rank}",
            f"pretrained_lora_path: {quoted(start.init.as_posix())}",
            *chosen,
        ]
    )
    text = f"""# Trains {start.name} with ai-toolkit, starting from {start.init.name}: python run.py config.yaml
job: extension
config:
  name: {quoted(start.name)}
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      network:
        {network}
      save: {{dtype: bf16, save_every: {SAVE_STEPS}, max_step_saves_to_keep: {SAVES}}}
      datasets:
        - folder_path: {quoted(start.dataset.folder.as_posix())}
          caption_ext: txt
          caption_dropout_rate: 0.05
          cache_latents_to_disk: true
          resolution: [512, 768, {SIDE}]
      train:
        batch_size: 1
        steps: {STEPS}
        cache_text_embeddings: true
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: {start.learning_rate}
        dtype: bf16
      model:
        name_or_path: {quoted(_model(start))}
        arch: {BASE_VERSIONS.get(start.arch.id) or BASE_VERSIONS[family]}
        quantize: true
        quantize_te: true
        low_vram: true
      sample:
        sampler: flowmatch
        sample_every: {SAVE_STEPS}
        prompts: [{", ".join(map(quoted, start.dataset.sample_prompts()))}]
        width: {SIDE}
        height: {SIDE}
        guidance_scale: 4
        sample_steps: 25
        neg: ""
        seed: 42
meta: {{name: "[name]", version: "1.0"}}
"""
    places = {
        "CONFIG": start.beside("config.yaml"),
        "INIT": start.init.as_posix(),
    }
    return {"train.py": training_script(start, "ai-toolkit", places, ["python run.py $CONFIG"]), "config.yaml": text}


FILES = {
    "flux2-klein-4b": "flux-2-klein-base-4b.safetensors", "flux2-klein-9b": "flux-2-klein-base-9b.safetensors",
    "flux2-dev": "flux2-dev.safetensors",
}  # fmt: skip
"""Architecture -> the file of its repository that it reads, which holds the transformer as first implemented."""


def _model(start: TrainingStart) -> str:
    """The folder of the base model, else its repository. A folder without the file that it reads is none."""
    file, home = FILES.get(start.arch.id), start.bases.get("folder")
    return base_repo(start.arch) if file and home and not (home / file).is_file() else start.model


MODELS = {
    family: ModelSupport(default, trainable, partial(_config, family=family), partial(_trained, family=family), fused)
    for family, default, trainable, fused in (
        ("qwen-image", r"transformer_blocks\..*", r"transformer_blocks\..*", False),
        ("z-image", r"layers\..*", r"(layers|context_refiner|noise_refiner)\..*", False),
        ("flux2", r"(double_blocks|single_blocks)\..*", r"(double_blocks|single_blocks)\..*", True),
    )
}

AI_TOOLKIT = Trainer(
    "ai-toolkit",
    "ai-toolkit",
    "webui",
    MODELS,
    (
        "Keep the run's name: with the name of an earlier run it would start from that one's checkpoint instead.",
        "The log must say `Missing keys: []`, or list only modules that start fresh: what it lists was not loaded.",
    ),
    rate_place=("config.yaml", "lr"),
    memory={"qwen-image": "above 24 GB: for 24 its example takes 3 bits (`qtype`)"},
    home="toolkit/config_modules.py",
    results="output/{name}/{name}*.safetensors",
)
