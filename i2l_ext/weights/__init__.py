"""Bytes of safetensors files become tensors, a piece at a time."""
