"""Published galleries: their states in an object store, and the folders that follow them."""
