"""Galleries and vectors as files that other programs read and write."""
