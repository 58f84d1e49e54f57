"""Readers of captioned images: folders, WebDataset shards and Hugging Face data sets."""
