"""The engine's process, from inside."""
