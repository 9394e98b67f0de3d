"""The names of weights in transformers' modules, and in the files."""

from __future__ import annotations

RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "siglip2": (("vision_model.", ""),),  # transformers 4
    "dinov3": (("model.layer.", "layer."),),  # transformers 5
    "qwen_vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
}
"""By encoder: (start of the module's key, start of the file's key). Any other key is the same in both.

The files were written by other versions of transformers than the installed one. An entry applies where the module's own
keys start with it, so no version numbers are compared.
"""


def file_key(encoder: str, module_key: str) -> str:
    """The name in the file of the weight that the installed transformers calls ``module_key``."""
    for module_start, file_start in RENAMES[encoder]:
        if module_key.startswith(module_start):
            return file_start + module_key[len(module_start) :]
    return module_key
