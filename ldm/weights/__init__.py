"""Files of weights: detect, read and write them, and map the names of tensors between layouts."""
