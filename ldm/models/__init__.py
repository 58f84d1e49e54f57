"""The networks: tensors in, tensors out. No file, no sampler and no prompt is handled here."""
