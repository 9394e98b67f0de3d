"""What runs inside a trainer's own process: its network is built by the trainer, and set from an i2L LoRA here."""
