"""Data sets that a training step reads."""
