"""Readers, token stores, training lists and their batches as packed arrays; no module imports jax."""
