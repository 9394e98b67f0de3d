"""The folder in which a WebUI keeps its LoRAs: free names, files that appear whole, and what is written about them."""

from i2l_ext.library.folder import Saved, check_folder, find_lora_folder, fresh_name, save

__all__ = ["Saved", "check_folder", "find_lora_folder", "fresh_name", "save"]
