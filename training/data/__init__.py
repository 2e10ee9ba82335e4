"""Data sets for training, and their augmentation."""
