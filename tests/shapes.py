"""The shape of an encoder, and of both models, as most tests compute them."""

from rqv2_jax.models import released
from rqv2_jax.models import scoring as models


def read_shape(folder, num_layers, *, dropout=0.1, unrolled=True):
    """`released.read_config` of a model folder, in float32, nothing computed again."""
    return released.read_config(
        folder,
        num_layers=num_layers,
        dropout=dropout,
        dtype="float32",
        remat="none",
        attention="plain",
        unrolled=unrolled,
    )


def models_of(
    config,
    pooling="cls",
    *,
    towers="separate",
    similarity="dot",
    scale=1.0,
    head="linear",
    reranker=None,
    reranker_pooling="cls",
):
    """Both models with encoders of one shape, or with the re-ranker's own."""
    return models.Models(
        config, reranker or config, towers, pooling, similarity, scale, head, reranker_pooling
    )
