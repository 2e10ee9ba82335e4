"""From a data set and a network to fitted weights."""
