"""Latent diffusion models: reading from every layout, assembly, writing."""
