"""What checkpoints exist, where they lie, and how their weights reach the module that uses them."""
