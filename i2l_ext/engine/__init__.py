"""The engine's process, seen from outside: its queue, one process, locks. Standard library only."""
