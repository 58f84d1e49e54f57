"""Training: one loop for every network, losses, caches, checkpoints, and recipes of several stages."""
