"""What a bug report needs, and nothing that names a person or a folder of theirs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from i2l_ext import __version__, requests
from i2l_ext.converters.errors import UserError
from i2l_ext.models import catalogue, store
from i2l_ext.models.listing import listing
from i2l_ext.operations.context import Context
from i2l_ext.operations.licences import licences
from i2l_ext.operations.selftest import FAILED, self_test
from i2l_ext.requests import EngineOptions

PACKAGES = (
    "torch", "transformers", "safetensors", "diffusers", "accelerate", "gradio", "numpy", "pillow",
    "huggingface-hub", "modelscope", "peft", "platformdirs",
)  # fmt: skip


@dataclass(frozen=True)
class DoctorResult:
    """``facts``: {name: value}, in the order in which they are shown."""

    facts: Mapping[str, str]

    def json(self) -> dict[str, str]:
        return dict(self.facts)

    @property
    def failed(self) -> bool:
        """Whether a check of the self-test came out badly."""
        return any(value.startswith(FAILED) for value in self.facts.values())

    @property
    def text(self) -> str:
        """A line for each fact, the values below each other."""
        width = max(map(len, self.facts))
        return "\n".join(f"{name:{width}}  {value}" for name, value in self.facts.items())


def examine_installation(request: requests.DoctorRequest, context: Context) -> DoctorResult:
    """Versions, devices and models; with ``licences`` those of all packages instead, with ``selftest`` its lines."""
    if request.licences:
        return DoctorResult(dict(_licences()))
    if request.selftest:
        return DoctorResult(dict(self_test(context)))
    host = {"host": request.host} if request.host else {}
    return DoctorResult({**host, **dict(_facts(context.options))})


def _facts(options: EngineOptions) -> Iterator[tuple[str, str]]:
    yield "i2l", __version__
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "memory", _memory()
    yield "cores", str(os.cpu_count())
    for name in PACKAGES:
        yield name, _version(name)
    yield from _devices(options)
    yield "own packages", "in use" if any(".private" in Path(entry).parts for entry in sys.path) else "not in use"
    yield from _models()


def _licences() -> Iterator[tuple[str, str]]:
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


def _devices(options: EngineOptions) -> Iterator[tuple[str, str]]:
    """Which devices there are, which one computes, and in which dtype it computes each of the published encoders."""
    try:
        import torch  # noqa: F401 - the others need it
    except ImportError as error:
        yield "devices", f"torch cannot be imported: {type(error).__name__}"
        return
    from i2l_ext.weights.devices import choose_dtype, device_facts, devices_here, resolve_device, resolve_precision

    yield "devices", ", ".join(str(device_facts(name)) for name in devices_here())
    try:
        device, precision = device_facts(resolve_device(options.device)), resolve_precision(options.precision)
    except UserError as error:
        yield "computes on", str(error)
        return
    yield "computes on", str(device)
    encoders = {part.id: part for model in catalogue.MODELS.values() for part in model.encoders if part.repo}
    for part in encoders.values():
        yield f"computes {part.id} in", str(choose_dtype(device, part.spec.safe_dtypes, precision))


def _models() -> Iterator[tuple[str, str]]:
    for row in listing():
        yield f"model {row.name}", "ready" if row.ready else "not downloaded"
    folder = store.Folders.default().own
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    yield "free for models", f"{shutil.disk_usage(folder).free / 1e9:.0f} GB"
