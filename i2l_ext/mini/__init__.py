"""Mini, the built-in test model: a small world of pictures, a base model for it, encoders and i2L models."""
