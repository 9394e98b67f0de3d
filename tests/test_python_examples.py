"""The examples of docs/python.md, run."""

import doctest
from pathlib import Path

import torch

from i2l_ext.converters import Lora
from i2l_ext.converters.architectures import MINI

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"


def test_the_examples_say_what_happens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)

    def pair(path):
        d_out, d_in = MINI.modules[path].shape
        return torch.randn(4, d_in, generator=generator), torch.randn(d_out, 4, generator=generator)

    Lora.of(MINI, {path: pair(path) for path in MINI.i2l_modules}).save("style.safetensors")
    outcome = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.attempted > 20 and outcome.failed == 0
