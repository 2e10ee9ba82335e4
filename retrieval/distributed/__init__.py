"""Embedding with many machines: blocks of photos, the worker of one machine, and the run on Ray."""
