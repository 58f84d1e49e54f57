"""What is done with each field of the configurations that diffusers and transformers write, as data."""
