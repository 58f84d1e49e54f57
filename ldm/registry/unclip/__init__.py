"""unCLIP models and priors: reading from every layout, assembly, writing."""
