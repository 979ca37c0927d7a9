"""Solvers over any velocity, guidance, and numbered images."""
