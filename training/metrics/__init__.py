"""Pure functions on arrays: how good predictions, distances and probabilities are."""
