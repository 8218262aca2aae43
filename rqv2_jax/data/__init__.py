"""From files to packed arrays. Nothing in here imports jax."""
