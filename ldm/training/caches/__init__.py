"""What frozen networks make of the cached scenes of a run: latents and embeddings, computed once."""
