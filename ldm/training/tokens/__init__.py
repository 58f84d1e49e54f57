"""Trainings of models of image tokens: the autoencoder, and the decoder of tokens."""
