"""Evaluation of a model: protocols, measurements, and result files."""
