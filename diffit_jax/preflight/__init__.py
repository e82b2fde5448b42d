"""Prices of TPU programs, without a TPU."""
