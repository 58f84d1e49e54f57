"""Weights on disk: reading, writing, naming of the published layouts, and what is in a file."""
