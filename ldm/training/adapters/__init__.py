"""Adapters in training, and what their trainings have in common."""
