"""Metrics, run files and answers. Nothing in here imports jax."""
