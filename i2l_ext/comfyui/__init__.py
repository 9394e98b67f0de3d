"""The nodes for ComfyUI."""
