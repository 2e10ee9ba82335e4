"""Data sets, and what they look like in training."""
