"""A config as typed, checked values."""
