"""Convolutional U-nets that the paper compares with, and puts TMSA into."""
