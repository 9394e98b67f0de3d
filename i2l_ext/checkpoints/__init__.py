"""Weights on disk: what exists (catalogue), where it is (store), how it is read (stream)."""
