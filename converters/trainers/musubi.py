"""musubi-tuner: kohya keys, ``--network_dim`` and ``--network_alpha`` both the file's rank.

musubi-tuner sets the alpha when it makes the network (1 by default) and ignores the file's. With the default the run
would start too weak by a factor of the rank. Found in musubi_tuner/networks and trainer_base.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from .base import SAVES, SIDE, ModelSupport, Trainer, TrainingStart, missing_kinds, modules_matching, quoted
from .script import LAUNCH, training_script

QWEN_DEFAULT = r"transformer_blocks\..*"
Z_DEFAULT = r"layers\.\d+\.(attention|feed_forward)\..*"
Z_TRAINABLE = r"(layers|context_refiner|noise_refiner)\..*"
FLUX2_DEFAULT = r"(double_blocks|single_blocks)\..*"

EPOCHS = SAVES

SETTINGS = {
    "qwen-image": ("qwen_image", "shift --weighting_scheme none --discrete_flow_shift 2.2", 5e-5),
    "z-image": ("zimage", "shift --weighting_scheme none --discrete_flow_shift 2.0", 1e-4),
    "flux2": ("flux_2", "flux2_shift --weighting_scheme none", 1e-4),
}
"""Family -> the beginning of its scripts' names, and how to draw timesteps and learn as its guide advises."""

VERSIONS = {
    "qwen-image": "original", "flux2-klein-4b": "klein-base-4b", "flux2-klein-9b": "klein-base-9b", "flux2-dev": "dev",
}  # fmt: skip
"""Id or family of an architecture -> what its scripts call it, where they train several."""


FILES = {
    "qwen-image": {
        "DIT": "qwen_image_bf16.safetensors of Comfy-Org/Qwen-Image_ComfyUI; no fp8 file can be used",
        "VAE": "qwen_image_vae.safetensors, from there",
        "TE": "qwen_2.5_vl_7b.safetensors, from there; not fp8_scaled",
    },
    "z-image": {
        "DIT": "of Comfy-Org/z_image, or the first file of `transformer` of Tongyi-MAI/Z-Image",
        "VAE": "from there",
        "TE": "Qwen3 4B, from there",
    },
}
"""Family -> the files of the base model that its guide names (docs/qwen_image.md and docs/zimage.md there)."""


def _patterns(start: TrainingStart, family: str) -> dict[str, list[str]]:
    """The regular expressions that make musubi train what the LoRA has and nothing else. A dot is [.], as musubi reads
    them as Python's texts, where a backslash before it is no escape."""
    support = MODELS[family]
    missing = missing_kinds(start, support)
    both = {"img_mlp.net.0.proj", "txt_mlp.net.0.proj"}
    exclude = [".*mlp[.]net[.]0.*"] if both <= {*missing} else []
    exclude += [f".*{kind.replace('.', '[.]')}" for kind in missing if not (exclude and kind in both)]
    by_default = {*modules_matching(start.arch, support.default)}
    extra = [path for path in start.paths if path not in by_default]
    include = []
    if any("_refiner" in path and "adaLN" not in path for path in extra):
        include.append(r".*_refiner.*(attention|feed_forward).*")
    for stack in dict.fromkeys(path.split(".")[0] for path in extra if "adaLN_modulation" in path):
        include.append(f"{stack}[.].*adaLN_modulation.*")
    return {key: patterns for key, patterns in (("exclude", exclude), ("include", include)) if patterns}


def _trained(start: TrainingStart, *, family: str) -> list[str]:
    patterns = _patterns(start, family)

    def matches(key: str, path: str) -> bool:
        return any(re.fullmatch(pattern, path) for pattern in patterns.get(key, ()))

    by_default = {*modules_matching(start.arch, MODELS[family].default)}
    chosen = {path for path in by_default if not matches("exclude", path)}
    return [path for path in start.arch.modules if path in chosen or matches("include", path)]


def _network_args(start: TrainingStart, family: str) -> str:
    args = [f"{key}_patterns=[{','.join(map(repr, patterns))}]" for key, patterns in _patterns(start, family).items()]
    return f"--network_args {' '.join(args)}" if args else ""


def _script(start: TrainingStart, *, family: str) -> Mapping[str, str]:
    stem, flags, _ = SETTINGS[family]
    known = VERSIONS.get(start.arch.id) or VERSIONS.get(family)
    version = f" --model_version {known}" if known else ""
    if MODELS[family].fused and "folder" in start.bases:  # whose transformer and VAE have other names than it reads
        start = replace(start, bases={"text_encoder": start.bases["text_encoder"]})
    places = {
        "DIT": start.base("transformer", "transformer.safetensors"),
        "VAE": start.base("vae", "vae.safetensors"),
        "TE": start.base("text_encoder", "text_encoder.safetensors"),
        "DATASET": start.beside("dataset.toml"),
        "INIT": start.init.as_posix(),
    }
    scripts = f"src/musubi_tuner/{stem}"
    commands = (
        f"python {scripts}_cache_latents.py --dataset_config $DATASET --vae $VAE{version}",
        f"python {scripts}_cache_text_encoder_outputs.py --dataset_config $DATASET --text_encoder $TE --batch_size 1"
        f"{version}",
        f"""{LAUNCH} --num_cpu_threads_per_process 1 --mixed_precision bf16 {scripts}_train_network.py
        --dit $DIT --vae $VAE --text_encoder $TE{version} --dataset_config $DATASET
        --sdpa --mixed_precision bf16 --timestep_sampling {flags}
        --learning_rate {start.learning_rate} --optimizer_type adamw8bit --gradient_checkpointing
        --max_data_loader_n_workers 2 --persistent_data_loader_workers
        --network_module networks.lora_{stem} --network_dim {start.rank} --network_alpha {start.rank}
        --network_weights $INIT {_network_args(start, family)}
        --max_train_epochs {EPOCHS} --save_every_n_epochs 1 --seed 42 --output_dir output --output_name {start.name}""",
    )
    script = training_script(start, "musubi-tuner", places, commands, hints=FILES.get(family))
    return {"train.py": script, "dataset.toml": _dataset(start)}


def _dataset(start: TrainingStart) -> str:
    return f"""[general]
resolution = [{SIDE}, {SIDE}]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true

[[datasets]]
image_directory = {quoted(start.dataset.folder.as_posix())}
cache_directory = {quoted(start.beside("cache"))}
num_repeats = {start.dataset.repeats(EPOCHS)}{start.dataset.repeats_comment(EPOCHS)}
"""


MODELS = {
    family: ModelSupport(
        default,
        trainable,
        partial(_script, family=family),
        partial(_trained, family=family),
        fused,
        SETTINGS[family][2],
    )
    for family, default, trainable, fused in (
        ("qwen-image", QWEN_DEFAULT, QWEN_DEFAULT, False),
        ("z-image", Z_DEFAULT, Z_TRAINABLE, False),
        ("flux2", FLUX2_DEFAULT, FLUX2_DEFAULT, True),
    )
}

MUSUBI = Trainer(
    "musubi-tuner",
    "musubi-tuner",
    "kohya",
    MODELS,
    (
        "An interrupted run goes on only if `--save_state` was among the options; then `--resume FOLDER`.",
        "`--network_dim` and `--network_alpha` must both stay the file's rank: musubi-tuner ignores the file's alpha.",
        "The log must say `load network weights from …: <All keys matched successfully>`, or list only fresh modules.",
    ),
    downloads=False,
    memory={
        "qwen-image": "42 GB; for 30 add `--fp8_base --fp8_scaled` in the third command of `train.py`; for 24 there "
        "also `--blocks_to_swap 16`, and 64 GB of RAM; for 12 in the third command add `--fp8_base --fp8_scaled "
        "--blocks_to_swap 45`, and in the second `--fp8_vl`",
        "z-image": "not stated; it is less with `--fp8_base --fp8_scaled` in the third command of `train.py`, and with "
        "`--fp8_llm` in the second",
    },
    home="src/musubi_tuner",
    results="output/{name}*.safetensors",
)
