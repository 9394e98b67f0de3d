"""Embeddings become a LoRA."""
