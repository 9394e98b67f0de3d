"""The names of weights: what transformers' modules call them, and what the files call them."""

from __future__ import annotations

RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "siglip2": (("vision_model.", ""),),  # transformers 4
    "dinov3": (("model.layer.", "layer."),),  # transformers 5
    "qwen_vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
}
"""By encoder: (start of the module's key, start of the file's key). A key that starts otherwise is the same in both.

The files were written by other versions of transformers than the one installed. Each entry names what that version
calls a part, so the module's own keys decide which entries apply, and no version number does.
"""


def file_key(encoder: str, module_key: str) -> str:
    """The name in the file of the weight that the installed transformers calls ``module_key``."""
    for module_start, file_start in RENAMES[encoder]:
        if module_key.startswith(module_start):
            return file_start + module_key[len(module_start) :]
    return module_key
