"""The licences of all that we stand on, as the packages themselves state them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

ROOTS = (
    "torch", "transformers", "safetensors", "numpy", "pillow", "platformdirs", "tqdm", "huggingface-hub", "filelock",
    "matplotlib", "gradio", "diffusers", "accelerate", "pyyaml", "modelscope-hub", "peft",
)  # fmt: skip
"""What pyproject.toml asks for, but for the tests' own tools: a checkout in a WebUI has no metadata of itself."""

_CLASSIFIER = "License :: "


@dataclass(frozen=True)
class Licence:
    """``text`` is an SPDX expression where the package gives one; "" where it says nothing."""

    name: str
    version: str
    text: str


def licences() -> list[Licence]:
    """Of every installed package that we need, directly or not, by name."""
    found: dict[str, Licence] = {}
    waiting = list(ROOTS)
    while waiting:
        name = _canonical(waiting.pop())
        if name in found:
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another system, or an extra that was not asked for
            continue
        found[name] = Licence(name, package.version, _stated(package.metadata))
        waiting += _needs(package)
    return [found[name] for name in sorted(found)]


def _needs(package: metadata.Distribution) -> Iterator[str]:
    for line in package.requires or ():
        name, _, marker = line.partition(";")
        if "extra" not in marker:
            yield re.split(r"[^\w.-]", name.strip(), maxsplit=1)[0]


def _stated(facts: metadata.PackageMetadata) -> str:
    if expression := facts.get_all("License-Expression", []):
        return expression[0]
    classified = [line.rpartition("::")[2].strip() for line in facts.get_all("Classifier", []) if _CLASSIFIER in line]
    first = next(iter("".join(facts.get_all("License", [])).strip().splitlines()), "")
    return ", ".join(classified) or first[:60]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
