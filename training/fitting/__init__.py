"""Fitting of a network to a data set, and the export of the result."""
