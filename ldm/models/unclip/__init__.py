"""The networks of unCLIP: diffusion and autoregressive priors, decoders, and noise augmentation."""
