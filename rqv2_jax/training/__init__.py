"""Training on packed batches, on any number of devices: losses, step, loop, sharding, checkpoints."""
