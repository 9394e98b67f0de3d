"""A stand-in for what we use of ComfyUI, written from what was seen of 0.33."""
