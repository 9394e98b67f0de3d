"""Training an i2L model: the miniature from nothing, or heads for a real base on your own pictures."""
