"""``i2l doctor``: what a bug report needs, and nothing that names a person or a folder of theirs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from i2l_ext import __version__
from i2l_ext.converters.errors import UserError

PACKAGES = (
    "torch", "transformers", "safetensors", "diffusers", "accelerate", "gradio", "numpy", "pillow",
    "huggingface-hub", "modelscope", "peft", "platformdirs",
)  # fmt: skip


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    doctor = subparsers.add_parser("doctor", help="print what a bug report needs", description="What a report needs.")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--licences", action="store_true", help="print the licences of all that is used, instead")
    doctor.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    facts = dict(_licences() if args.licences else examine())
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:{width}}  {value}")
    return 0


def examine(device: str = "auto", precision: str = "auto") -> Iterator[tuple[str, str]]:
    """(name, value) of everything worth knowing. ``device`` and ``precision``: what the user has chosen to compute on
    and in."""
    yield "i2l", __version__
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "memory", _memory()
    yield "cores", str(os.cpu_count())
    for name in PACKAGES:
        yield name, _version(name)
    yield from _devices(device, precision)
    yield "own packages", "in use" if any(".private" in Path(entry).parts for entry in sys.path) else "not in use"
    yield from _models()


def _licences() -> Iterator[tuple[str, str]]:
    from i2l_ext.operations.licences import licences

    yield "i2l", f"{__version__}: Apache-2.0"
    for one in licences():
        yield one.name, f"{one.version}: {one.text or 'not stated'}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _memory() -> str:
    if sys.platform != "win32":  # which has no sysconf
        with suppress(ValueError, OSError):
            return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    return "unknown"


def _devices(device: str, precision: str) -> Iterator[tuple[str, str]]:
    """Which there are, which one computes, and in which dtype it computes each of the published encoders."""
    try:
        import torch
    except ImportError as error:
        yield "devices", f"torch cannot be imported: {type(error).__name__}"
        return
    from i2l_ext.commands import engine
    from i2l_ext.models.catalogue import MODELS
    from i2l_ext.weights.devices import choose, facts

    yield "devices", ", ".join(["cpu", *(str(facts(f"cuda:{index}")) for index in range(torch.cuda.device_count()))])
    try:
        chosen, wish = facts(engine.device(device)), engine.precision(precision)
    except UserError as error:
        yield "computes on", str(error)
        return
    yield "computes on", str(chosen)
    encoders = {part.id: part for model in MODELS.values() for part in model.encoders if part.repo}
    for part in encoders.values():
        yield f"computes {part.id} in", str(choose(chosen, part.spec.safe_dtypes, wish))


def _models() -> Iterator[tuple[str, str]]:
    from i2l_ext.models import store

    for row in store.listing():
        yield f"model {row.name}", "ready" if row.ready else "not downloaded"
    folder = store.Folders.default().own
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    yield "free for models", f"{shutil.disk_usage(folder).free / 1e9:.0f} GB"
