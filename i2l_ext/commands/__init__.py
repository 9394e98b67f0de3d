"""The commands of ``i2l``, a few to a file. ``register(subparsers)`` adds them; nothing heavy is imported before one
runs."""
