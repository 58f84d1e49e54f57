"""Metrics of sets of images: features, distances between sets, their intervals, and a report."""
