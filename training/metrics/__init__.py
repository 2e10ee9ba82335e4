"""Metrics of predictions, distances and probabilities: pure functions on arrays."""
