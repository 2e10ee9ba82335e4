"""How good a model is: protocols, measurements, and their files."""
