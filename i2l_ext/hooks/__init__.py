"""Runs in a trainer's process: sets the factors of the network that the trainer has built from an i2L LoRA."""
