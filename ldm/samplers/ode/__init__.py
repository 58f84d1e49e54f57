"""Solvers of the probability-flow ODE: deterministic, except for the optional noise of ddim and churn."""
