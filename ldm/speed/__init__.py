"""Faster execution of the networks: `optimize`, compiled kernels, and approximations (off by default)."""
