"""The rows of trainers.py in which a trainer's own program runs from its configuration to the file that it saves:
ai-toolkit and flymyai-lora-trainer. The models are small; what encodes pictures or prompts is stood in for."""

from __future__ import annotations

import os
import re
import runpy
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch

from i2l_ext.converters import Lora
from i2l_ext.converters.start_folder import StartFolder
from i2l_ext.hooks import ai_toolkit, peft
from i2l_ext.hooks.network import initialize_network, kohya_modules
from trainer_parts import STYLE, Build, imported, of_peft, strength, worst


def peft_hook(model: Any, lora: Lora, told: StartFolder) -> None:
    """The hook over an adapter as docs/trainers.md makes it, of the start folder's rank."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=told.rank, lora_alpha=told.rank, target_modules=[*lora]))
    peft.initialize(model, Path(told.folder).parent / STYLE)


def aitoolkit(lora: Lora, build: Build, told: StartFolder, checkout: Path, hook: bool = False) -> dict[str, Any]:
    """`BaseSDTrainProcess.run` of its SDTrainer by its own job, from config.yaml, or with the hook as docs/trainers.md
    says: 3 steps at a rate of 0, with and without EMA; 6 steps, and the same run again to 9 at a rate of 0. Stood in
    for: loading the model, pictures, VAE and text encoder, and the loss of a step."""
    sys.path.insert(0, str(checkout))
    os.environ["ACCELERATE_USE_CPU"] = "true"
    imported(
        "diffusers.pipelines.ltx2.export_utils"
    ).encode_video = None  # wants PyAV; the name is of a later diffusers
    import yaml

    sys.modules.setdefault("oyaml", yaml)  # the same, for a Python whose dicts had no order
    from extensions_built_in.sd_trainer.SDTrainer import SDTrainer
    from jobs.ExtensionJob import ExtensionJob
    from toolkit.config import get_config
    from toolkit.util.get_model import get_model_class

    file, output = Path(told.folder).parent / STYLE, Path(told.folder).parent / "output"
    seen: dict[str, float] = {}

    class Trainer(SDTrainer):
        def hook_add_extra_train_params(self, params: Any) -> Any:
            if hook:
                ai_toolkit.initialize(self, file)
            layers = self.network.unet_loras
            named = {one.lora_name.replace("$$", ".").removeprefix("transformer."): one for one in layers}

            def delta(path: str) -> torch.Tensor:
                return named[path].scale * named[path].lora_up.weight @ named[path].lora_down.weight

            seen.setdefault("step 0", worst(lora, delta))
            seen["began at"] = self.step_num
            return super().hook_add_extra_train_params(params)

        def encode_static_prompt(self, prompt: Any, **_: Any) -> torch.Tensor:
            return torch.zeros(1)

        def train_single_accumulation(self, batch: Any) -> torch.Tensor:
            layers = [(one, torch.ones(1, one.lora_down.in_features)) for one in self.network.unet_loras]
            loss = torch.stack([(one.lora_up(one.lora_down(x)) ** 2).mean() for one, x in layers]).sum()
            self.accelerator.backward(loss)
            return loss.detach()

    class OldAdvice(Trainer):
        def hook_add_extra_train_params(self, params: Any) -> Any:
            return SDTrainer.hook_add_extra_train_params(self, params)

        def hook_before_train_loop(self) -> None:
            super().hook_before_train_loop()
            initialize_network(kohya_modules(self.network.unet_loras), file)

    def model_class(config: Any) -> type:
        def load_model(self: Any) -> None:
            self.model = self.unet = build()
            self.vae, self.text_encoder = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
            self.tokenizer, self.pipeline = None, MagicMock()

        return type("Small", (get_model_class(config),), {"load_model": load_model})

    config = get_config(str(Path(told.folder) / "config.yaml"))
    [process] = config["config"]["process"]
    process |= {"training_folder": str(output), "device": "cpu", "datasets": []}
    if hook:
        process["network"].pop("pretrained_lora_path")
    process["train"] |= {"dtype": "fp32", "disable_sampling": True, "optimizer": "adamw"}
    process["model"] |= {"quantize": False, "quantize_te": False, "low_vram": False}
    process["save"] |= {"dtype": "float32"}

    def run(name: str, steps: int, rate: float, decay: float | None = None, kind: type = Trainer) -> Path:
        config["config"]["name"] = name
        process["train"] |= {"steps": steps, "lr": rate}
        process["train"]["ema_config"] = {"use_ema": decay is not None, "ema_decay": decay or 0.99}
        with patch("jobs.ExtensionJob.get_all_extensions_process_dict", lambda: {"sd_trainer": kind}):
            ExtensionJob(config).run()
        return output / name / f"{name}.safetensors"

    with patch("jobs.process.BaseSDTrainProcess.get_model_class", model_class):
        plain, average = (strength(lora, run(f"ema_{decay}", 3, 0.0, decay)) for decay in (None, 0.99))
        trained = Lora.read(run("longer", 6, 1e-3))
        first = {path: [factor.clone() for factor in trained[path]] for path in trained}
        again = Lora.read(run("longer", 9, 0.0))
        control = {"control: hooked in later, EMA": strength(lora, run("old", 3, 0.0, 0.99, OldAdvice))} if hook else {}
    same = all(torch.equal(a, b) for path in first for a, b in zip(first[path], again[path], strict=True))
    row = {"step 0": seen["step 0"], "strength": plain, "strength with EMA": average}
    return {**row, **control, "resumed": same and seen["began at"] == 6, "resumed at step": seen["began at"]}


def flymyai(lora: Lora, build: Build, told: StartFolder, checkout: Path) -> dict[str, Any]:
    """Its whole train.py through start.py, with the written configuration: its pictures, VAE, scheduler, two steps at a
    rate of 0, and the file that it saves. Stood in for: OmegaConf, and the text encoder."""
    import diffusers
    import yaml

    sys.path.insert(0, str(checkout))
    os.environ["ACCELERATE_USE_CPU"] = "true"
    folder, kind = Path(told.folder), diffusers.QwenImageTransformer2DModel
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config |= {key: float(value) for key, value in config.items() if re.fullmatch(r"\de-\d", str(value))}  # YAML 1.2
    config |= {"max_train_steps": 2, "checkpointing_steps": 2, "learning_rate": 0.0, "mixed_precision": "no"}
    config |= {"output_dir": str(folder / "output"), "pretrained_model_name_or_path": str(folder / "base")}
    config["data_config"] |= {"img_size": 64, "num_workers": 0}
    sizes: dict[str, Any] = {**build().config}
    width, channels = sizes["joint_attention_dim"], sizes["in_channels"] // 4
    kind(**sizes | {"out_channels": channels}).save_pretrained(folder / "base/transformer")
    latents = {"z_dim": channels, "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **latents)
    vae.save_pretrained(folder / "base/vae")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "base/scheduler")
    seen: dict[str, float] = {}

    class Prompts:
        def to(self, device: Any) -> None:
            pass

        def encode_prompt(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.randn(1, 7, width), torch.ones(1, 7, dtype=torch.long)

    checkpointing, forward = kind.enable_gradient_checkpointing, kind.forward

    def at_step_0(model: Any) -> None:  # its train.py calls this when the adapter is there
        seen["step 0"] = worst(lora, of_peft(model))
        checkpointing(model)

    def without_lengths(model: Any, *values: Any, txt_seq_lens: Any = None, **named: Any) -> Any:
        return forward(model, *values, **named)  # diffusers takes the lengths from the mask since 0.37

    with ExitStack() as patches:
        for place, name, value in (
            (diffusers.QwenImagePipeline, "from_pretrained", lambda *_, **__: Prompts()),
            (kind, "enable_gradient_checkpointing", at_step_0),
            (kind, "forward", without_lengths),
            (sys, "argv", [str(folder / "start.py"), str(checkout / "train.py"), "--config", "config.yaml"]),
        ):
            patches.enter_context(patch.object(place, name, value))
        omegaconf = MagicMock(name="omegaconf")
        omegaconf.OmegaConf.load = lambda _: SimpleNamespace(**config)
        patches.enter_context(patch.dict(sys.modules, omegaconf=omegaconf))
        runpy.run_path(str(folder / "start.py"), run_name="__main__")
    [saved] = folder.glob("output/**/pytorch_lora_weights.safetensors")
    return {"step 0": seen["step 0"], "strength": strength(lora, saved), "resumed": "it cannot resume"}
