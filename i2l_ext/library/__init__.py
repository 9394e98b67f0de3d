"""The folder in which a WebUI keeps its LoRAs: free names, files that appear whole, and their metadata."""

from i2l_ext.library.folder import (
    SavedLora,
    check_folder,
    find_lora_folder,
    free_name,
    fresh_name,
    names_below,
    save_lora,
)

__all__ = [
    "SavedLora", "check_folder", "find_lora_folder", "free_name", "fresh_name", "names_below", "save_lora",
]  # fmt: skip
