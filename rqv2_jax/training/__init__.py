"""One training step and the loop around it, on any number of devices; checkpoints. Knows no texts."""
