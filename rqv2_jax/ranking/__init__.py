"""Metrics, significance tests, run files and answers; no module imports jax."""
