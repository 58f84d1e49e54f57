"""Trainings that begin with a loaded model: of all its weights, of adapters, of words and of images."""
