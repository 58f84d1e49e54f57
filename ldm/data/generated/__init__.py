"""Data sets of images that a model generates: WebDataset shards with recipes."""
