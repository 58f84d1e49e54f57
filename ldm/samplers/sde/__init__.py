"""Solvers of the reverse SDE: samplers that add noise at their steps."""
