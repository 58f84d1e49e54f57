"""The mathematics of diffusion: schedules, time grids, predictions, guidance, noise. No network, no file."""
