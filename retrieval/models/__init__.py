"""Models: what a model on disk is, and what runs it."""
