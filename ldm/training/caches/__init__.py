"""What frozen networks make of the cached compositions of a run: latents and embeddings, computed once."""
