"""Rows and vectors of a gallery in step, and their backups."""
