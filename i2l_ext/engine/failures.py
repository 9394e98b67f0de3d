"""Why an engine failed: a stable code, and what usually helps. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

HINTS: Mapping[str, str] = {
    "out_of_memory": "Memory ran out. Close other programs, free the WebUI's VRAM (Settings), or set a memory limit.",
    "disk_full": "The disk is full. Free some space, or choose folders on another disk.",
    "weights_missing": "Press Download beside the model, or try mini, which needs none.",
    "package_missing": "A Python package is missing or too old. Restart the WebUI, which sets up the engine's own "
    "packages.",
    "no_diffsynth": "Open Models and press Set up DiffSynth-Studio, or name the folder of the environment in which you "
    "have it in Settings.",
    "no_network": "See whether this machine reaches the network. What was fetched is kept.",
    "not_delivered": "If it fails again: does your browser reach the hub's page? A proxy or a mirror is set before the "
    "WebUI starts (docs/storage.md).",
    "gpu_refused": "The graphics card or its driver refused. Choose the device cpu in Settings to see whether that "
    "is the cause.",
}
"""Code of a failure -> what usually helps. Other codes have no hint."""

_SIGNS = (
    (r"out of memory|OutOfMemoryError|MemoryError|DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED", "out_of_memory"),
    (r"No space left|disk is full|Errno 28|Disk quota", "disk_full"),
    (r"No module named|ImportError|cannot import name", "package_missing"),
    (r"CUDA error|no kernel image|NVIDIA driver", "gpu_refused"),
)
"""Pattern in what an engine printed -> code."""

_KILLED = (-9, 137)
"""Exit codes after SIGKILL, directly and through a shell. Linux sends it when memory runs out."""


def diagnose(lines: Iterable[str], exit_code: int = 0) -> str | None:
    """The code of a failure for which the engine gave none, from its output and its exit code; None: unknown."""
    if exit_code in _KILLED:
        return "out_of_memory"
    text = "\n".join(lines)
    return next((code for pattern, code in _SIGNS if re.search(pattern, text, re.IGNORECASE)), None)
