"""Load, save, register, list, replay, inspect and bundle models."""
