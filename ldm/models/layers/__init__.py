"""Layers that several networks share: attention, transformers, residual blocks, norms, embeddings."""
