"""The node that puts a LoRA on a model: on both branches."""

from __future__ import annotations

from collections.abc import Mapping

NODES: Mapping[str, tuple[type, str]] = {}
"""ComfyUI's name -> the class, and its title."""
