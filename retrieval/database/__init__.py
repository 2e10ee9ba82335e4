"""The SQLite database of a gallery: its tables, and who reads and writes them."""
