"""Prompts, classes and images as conditions (`Cond`): prompt syntax, conditioners, image embeddings."""
