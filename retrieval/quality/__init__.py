"""What is wrong with a data set, or with a gallery."""
