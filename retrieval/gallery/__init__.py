"""The gallery: the facade, and the operations on it."""
