"""The databases that may hold a gallery's tables."""
