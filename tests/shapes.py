"""The shape of an encoder as most tests compute it."""

from rqv2_jax import weights


def read_shape(folder, num_layers, *, dropout=0.1, unrolled=True):
    """`weights.read_config` of a model folder, in float32, nothing computed again."""
    return weights.read_config(
        folder,
        num_layers=num_layers,
        dropout=dropout,
        dtype="float32",
        remat="none",
        attention="plain",
        unrolled=unrolled,
    )
