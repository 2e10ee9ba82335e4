"""Where photos come from, and what is said of them there."""
