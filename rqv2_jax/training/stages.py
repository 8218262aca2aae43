"""The losses of the three training stages, and what each stage trains on.

Shape suffixes: B lists, P passages of a list, N all passages of the global batch, D vector size.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
from ml_collections import ConfigDict

from rqv2_jax.models import losses
from rqv2_jax.models.bert import Params
from rqv2_jax.models.scoring import Models, retriever_scores

# Tokens that a CPU computes at once, so that activations fit its caches.
CPU_TOKENS = 10_000

Batch = dict[str, Any]
# Joins the shards' arrays along axis 0.
Gather = Callable[[Array], Array]
Loss = tuple[Array, dict[str, Array]]


def _vectors(
    models: Models, params: Params, batch: Batch, query_key: Array, passage_key: Array
) -> tuple[Array, Array]:
    """Returns queries [B, D], scaled so that it counts in every term, and passages [B*P, D]."""
    queries_BxD = models.scale * models.vectors(params["query"], batch["queries"], query_key)
    return queries_BxD, models.vectors(params["passage"], batch["passages"], passage_key)


def _in_batch(queries_BxD: Array, passages_NxD: Array, batch: Batch, gather: Gather) -> Array:
    """Returns the listwise cross-entropy of each query over all passages of the global batch."""
    return losses.listwise(
        gather(queries_BxD) @ gather(passages_NxD).T,
        gather(batch["in_batch_positive"]),
        where_BxP=gather(batch["in_batch_where"]),
    )


def retriever_loss(
    models: Models, params: Params, batch: Batch, key: Array, gather: Gather
) -> Loss:
    """Computes cross-entropy over the batch; passages that are no positive of a query are negatives."""
    vectors = _vectors(models, params["retriever"], batch, *jax.random.split(key))
    loss = _in_batch(*vectors, batch, gather)
    return loss, {"loss": loss}


def reranker_loss(
    models: Models, kind: str, params: Params, batch: Batch, key: Array, gather: Gather
) -> Loss:
    """Computes the "listwise" cross-entropy of the re-ranker (paper eq. 5) or the "pointwise" one."""
    positive_BxP, where_BxP = gather(batch["positive"]), gather(batch["where"])
    scores_N = gather(models.reranker_scores(params["reranker"], batch["pairs"], key))
    loss_fn = {"listwise": losses.listwise, "pointwise": losses.pointwise}[kind]
    loss = loss_fn(scores_N.reshape(where_BxP.shape), positive_BxP, where_BxP=where_BxP)
    return loss, {"loss": loss}


def joint_loss(
    models: Models, settings: Mapping, params: Params, batch: Batch, key: Array, gather: Gather
) -> Loss:
    """Adds weighted KL, supervised and in-batch terms of both models' scores of the same lists.

    Paper eq. 6 is weight 1 for the KL term and 0 for the in-batch one, the retriever's own listwise
    cross-entropy over all passages of the batch.

    Args:
      settings: the joint stage's (`loss`, the reading of the loss; `kl_weight`; `in_batch_weight`;
        `accumulate`; `train_reranker`, without which the re-ranker gets no gradient).
    """
    query_key, passage_key, pair_key = jax.random.split(key, 3)
    vectors = _vectors(models, params["retriever"], batch, query_key, passage_key)
    reranker = params["reranker"]
    if not settings["train_reranker"]:
        reranker, pair_key = jax.lax.stop_gradient(reranker), None
    pairs_N = gather(models.reranker_scores(reranker, batch["pairs"], pair_key))
    retriever_BxP = gather(retriever_scores(*vectors))
    _, terms = losses.joint_distillation(
        retriever_BxP,
        pairs_N.reshape(retriever_BxP.shape),
        gather(batch["positive"]),
        where_BxP=gather(batch["where"]),
        **settings["loss"],
    )
    if settings["loss"]["kl_reduction"] == "sum":
        # The parts of a batch are averaged, but this term is a sum over its lists.
        terms["kl"] *= settings["accumulate"]
    loss = settings["kl_weight"] * terms["kl"] + terms["supervised"]
    if settings["in_batch_weight"] > 0:
        terms["in_batch"] = _in_batch(*vectors, batch, gather)
        loss += settings["in_batch_weight"] * terms["in_batch"]
    return loss, {**terms, "loss": loss}


class Stage(NamedTuple):
    """A training stage: its loss, the models in it, and how its batches are made."""

    loss_fn: Callable[..., Loss]
    models: tuple[str, ...]  # keys of the params
    rates: dict[str, float]  # by model, as `train.make_optimizer` takes them
    list_size: int
    in_batch: bool  # whether batches have labels over all their passages
    accumulate: int


def make_stage(config: ConfigDict, models: Models, name: str) -> Stage:
    """Returns the stage "retriever", "reranker" or "joint" of a config."""
    settings = config[name]
    if name == "retriever":
        return Stage(partial(retriever_loss, models), ("retriever",), {}, 1, True, 1)
    size, accumulate = settings.list_size, _parts(config, name)
    if name == "reranker":
        loss_fn = partial(reranker_loss, models, settings.loss)
        return Stage(loss_fn, ("reranker",), {}, size, False, accumulate)
    loss_fn = partial(joint_loss, models, settings.to_dict() | {"accumulate": accumulate})
    rates = {"reranker": settings.reranker_rate if settings.train_reranker else 0.0}
    in_batch = settings.in_batch_weight > 0
    return Stage(loss_fn, ("retriever", "reranker"), rates, size, in_batch, accumulate)


def _parts(config: ConfigDict, name: str) -> int:
    """Returns the number of parts in which a device computes its lists of a batch."""
    settings, data = config[name], config.data
    if settings.accumulate:
        return settings.accumulate
    if jax.default_backend() != "cpu" or (name == "joint" and settings.in_batch_weight > 0):
        return 1
    passages = 0 if name == "reranker" else data.passage_length
    tokens = data.query_length + settings.list_size * (passages + data.pair_length)
    most, shards = max(CPU_TOKENS // tokens, 1), config.mesh.data * config.mesh.fsdp
    return next(
        parts
        for parts in range(1, settings.batch + 1)
        if settings.batch % parts == 0 and settings.batch <= most * parts * shards
    )
