"""A stand-in for ai-toolkit's BaseSDTrainProcess, written from what it does in which order (commit 27a03a9): the newest
file of the run's name is its checkpoint, else ``pretrained_lora_path``; the checkpoint is loaded and its step read
when the network has been built; then comes `hook_add_extra_train_params`, then the optimiser and the moving average,
then `hook_before_train_loop`. What is saved is the moving average where there is one."""

import types
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from musubi_contract import Module


class MovingAverage:
    def __init__(self, parameters, decay):
        self.parameters, self.decay = parameters, decay
        self.shadow = [parameter.detach().clone() for parameter in parameters]

    def update(self):
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            shadow.lerp_(parameter.detach(), 1 - self.decay)


class Process:
    def __init__(self, folder, modules, *, rank=4, ema=None, pretrained=None, named_lora=False, lr=1e-4):
        self.name, self.save_root, self.modules, self.rank = "run", Path(folder), modules, rank
        self.network_config = types.SimpleNamespace(pretrained_lora_path=pretrained)
        self.network = self.ema = None
        self.ema_decay, self.lr, self.named_lora = ema, lr, named_lora
        self.step_num = 0

    def get_latest_save_path(self, name=None, post=""):
        name = name or self.name
        found = [path for path in self.save_root.glob(f"{name}*{post}") if "_LoRA" in name or "_LoRA" not in path.name]
        if found:
            return str(max(found, key=lambda path: path.stat().st_mtime_ns))
        return self.network_config.pretrained_lora_path

    def hook_add_extra_train_params(self, params):
        return params

    def hook_before_train_loop(self):
        pass

    def setup_ema(self):
        if self.ema_decay is not None:
            self.ema = MovingAverage([*self.optimizer.param_groups[0]["params"]], self.ema_decay)

    def state(self):
        return {
            f"{module.lora_name.replace('$$', '.')}.lora_{side}.weight": getattr(module, f"lora_{way}").weight
            for module in self.network.unet_loras
            for side, way in (("A", "down"), ("B", "up"))
        }

    def run(self, steps):
        """Train until ``steps`` and save; returns what was saved."""
        loras = [Module("transformer$$" + path.replace(".", "$$"), layer, self.rank, self.rank, 1.0)
                 for path, layer in self.modules.items()]  # fmt: skip
        self.network = types.SimpleNamespace(unet_loras=loras)
        latest = self.get_latest_save_path(self.name + ("_LoRA" if self.named_lora else ""))
        if latest is not None:
            with safetensors.safe_open(latest, "pt") as file, torch.no_grad():
                for key, value in self.state().items():
                    value.copy_(file.get_tensor(key))
                if latest != self.network_config.pretrained_lora_path:
                    self.step_num = int(file.metadata()["step"])
        params = self.hook_add_extra_train_params([*self.state().values()])
        self.optimizer = torch.optim.AdamW(params, lr=self.lr, weight_decay=0)
        self.setup_ema()
        self.hook_before_train_loop()
        for step in range(self.step_num, steps):
            self.step_num = step
            for parameter in params:
                parameter.grad = torch.ones_like(parameter)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        values = self.ema.shadow if self.ema is not None else params
        saved = {key: value.detach().clone() for key, value in zip(self.state(), values, strict=True)}
        self.save_root.mkdir(parents=True, exist_ok=True)
        file = f"{self.name}{'_LoRA' if self.named_lora else ''}_{steps:09}.safetensors"
        safetensors.torch.save_file(saved, self.save_root / file, {"step": str(steps)})
        return saved
