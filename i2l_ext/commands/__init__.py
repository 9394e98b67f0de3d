"""The command line's commands: each module offers ``register(subparsers)``."""
