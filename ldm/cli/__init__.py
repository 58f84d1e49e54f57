"""The commands of `ldm`."""
