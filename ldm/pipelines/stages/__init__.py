"""Stages: one diffusion each, in latent space, in pixels or of embeddings."""
