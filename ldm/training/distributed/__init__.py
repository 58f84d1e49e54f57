"""Training by many processes: what they do together, and the checkpoints that they write together."""
