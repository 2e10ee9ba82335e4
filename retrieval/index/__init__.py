"""Vectors on disk, and the exact nearest of them."""
