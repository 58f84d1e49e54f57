"""The losses of training: of diffusion and contrast, of attention, and of views."""
