"""Small templates that we wrote, as folders, and an environment whose Python has the registry's diffsynth."""

from __future__ import annotations

import os
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

V2_MODELS = ("z-image-v2", "klein-4b-v2", "hidream-o1-v2")
"""All of them run from the command line in every run of the tests; in the tab and over HTTP one does, and with
I2L_ALL_TARGETS=1 all."""


def targets(one: str) -> tuple[str, ...]:
    """The models that a test runs through a page's engine."""
    return V2_MODELS if os.environ.get("I2L_ALL_TARGETS") else (one,)


STUBS = '''
"""Packages that diffsynth imports on its way to TemplatePipeline, and that no template of ours calls."""
import importlib.abc, importlib.machinery, importlib.util, sys, types

class Stub(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchvision", "modelscope", "imageio", "einops"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Stub(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.append(Finder())
'''

MODEL = '''
import torch

LAYERS = {layers}


class Emb2Lora(torch.nn.Module):
    """The mean colour of all pictures -> rank 4."""

    def __init__(self):
        super().__init__()
        self.emb2lora = torch.nn.Linear(3, 4)

    @torch.no_grad()
    def process_inputs(self, image, **kwargs):
        colours = [torch.tensor(list(one.resize((1, 1)).getpixel((0, 0)))) / 255 for one in image]
        return {{"colours": torch.stack(colours)}}

    def forward(self, colours, **kwargs):
        x = self.emb2lora(colours.to(self.emb2lora.weight)).mean(0)
        lora = {{}}
        for path, (d_out, d_in) in LAYERS.items():
            lora[path + ".lora_A.default.weight"] = x[:, None] * torch.linspace(-1, 1, d_in)
            lora[path + ".lora_B.default.weight"] = torch.linspace(-1, 1, d_out)[:, None] * x
        {result}
        return {{"lora": lora}}


TEMPLATE_MODEL = Emb2Lora
TEMPLATE_MODEL_PATH = "model.safetensors"
'''


def layers_of(arch, count=3):
    """Some layers of an architecture: path -> (d_out, d_in)."""
    return {path: module.shape for path, module in list(arch.modules.items())[-count:]}


def write_template(folder: Path, arch, *, first: str = "", result: str = "") -> Path:
    """A template repository. ``first``: lines of code at the start of model.py; ``result``: a line before the end."""
    folder.mkdir(parents=True, exist_ok=True)
    code = MODEL.format(layers=repr(layers_of(arch)), result=result)
    (folder / "model.py").write_text(textwrap.dedent(first) + code, encoding="utf-8")
    torch.manual_seed(0)
    weights = {"emb2lora.weight": torch.randn(4, 3), "emb2lora.bias": torch.randn(4)}
    save_file(weights, folder / "model.safetensors")
    return folder


def run_here(folder: Path, colours: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """What the template in ``folder`` makes of pictures of these colours, without DiffSynth-Studio and without a
    cage."""
    scope: dict = {}
    exec((folder / "model.py").read_text(), scope)  # noqa: S102 ours
    model = scope["TEMPLATE_MODEL"]()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        return model(**model.process_inputs([Image.new("RGB", (64, 64), colour) for colour in colours]))["lora"]


def environment(folder: Path) -> Path:
    """An environment that reaches the packages of this one, diffsynth among them."""
    venv.create(folder, with_pip=False, symlinks=sys.platform != "win32")
    site = next(folder.rglob("site-packages"))
    (site / "template_stubs.py").write_text(STUBS, encoding="utf-8")
    (site / "reach.pth").write_text(f"{sysconfig.get_paths()['purelib']}\nimport template_stubs\n", encoding="utf-8")
    return folder
