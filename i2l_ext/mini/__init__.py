"""A small universe of pictures with a base model, encoders and i2L models of its own: the embedded default."""
