"""The losses of the three training stages, and what each stage trains on.

Shape suffixes: B lists, P passages of a list, N all passages of the global batch, D vector size.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from rqv2_jax.models import losses, products
from rqv2_jax.models.bert import Params
from rqv2_jax.models.scoring import Models, retriever_scores, tower

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
    queries_BxD = models.scale * models.vectors(tower(params, "query"), batch["queries"], query_key)
    return queries_BxD, models.vectors(tower(params, "passage"), batch["passages"], passage_key)


def _read(
    read: Callable, params: Params, batch: Batch, key: Array, by_part: bool
) -> tuple[Any, Batch]:
    """Returns `read(params, batch, key)`, arrays whose axis 0 counts lists or passages, and the batch.

    If `by_part`, the batch's leading axis counts parts. They are read one after the other, and each
    once more for its gradient, so that memory is that of one part while the loss is that of all
    (gradient caching). Their arrays are joined along axis 0, as are the batch's labels.
    """
    if not by_part:
        return read(params, batch, key), batch

    def part(_: None, numbered: tuple[Array, Batch]) -> tuple[None, Any]:
        number, batch = numbered
        return None, read(params, batch, jax.random.fold_in(key, number))

    numbers = jnp.arange(len(jax.tree.leaves(batch)[0]))
    # In a loop nothing can be merged with the first pass.
    part = jax.checkpoint(part, prevent_cse=False)
    _, arrays = jax.lax.scan(part, None, (numbers, batch))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (arrays, batch))


def _in_batch(vectors: tuple[Array, Array], batch: Batch, gather: Gather) -> Array:
    """Returns the listwise cross-entropy of each query over all passages of the global batch."""
    queries_BxD, passages_NxD = vectors
    return losses.listwise(
        gather(queries_BxD) @ gather(passages_NxD).T,
        gather(batch["in_batch_positive"]),
        where_BxP=gather(batch["in_batch_where"]),
    )


def retriever_loss(
    models: Models, by_part: bool, params: Params, batch: Batch, key: Array, gather: Gather
) -> Loss:
    """Computes cross-entropy over the batch; passages that are no positive of a query are negatives.

    If `by_part`, the batch's leading axis counts parts; the loss is that of all together.
    """

    def read(params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        return _vectors(models, params["retriever"], batch, *jax.random.split(key))

    vectors, batch = _read(read, params, batch, key, by_part)
    loss = _in_batch(vectors, batch, gather)
    return loss, {"loss": loss}


def reranker_loss(
    models: Models, settings: Mapping, params: Params, batch: Batch, key: Array, gather: Gather
) -> Loss:
    """Computes the "listwise" cross-entropy of the re-ranker (paper eq. 5) or the "pointwise" one.

    A batch with the scores of a teacher adds their KL term. `settings` are the stage's (`loss`,
    `teacher_weight`, and `teacher_temperature`, by which the teacher's scores are divided).
    """
    positive_BxP, where_BxP = gather(batch["positive"]), gather(batch["where"])
    scores_N = gather(models.reranker_scores(params["reranker"], batch["pairs"], key))
    loss_fn = {"listwise": losses.listwise, "pointwise": losses.pointwise}[settings["loss"]]
    scores_BxP = scores_N.reshape(where_BxP.shape)
    supervised = loss_fn(scores_BxP, positive_BxP, where_BxP=where_BxP)
    if "teacher" not in batch:
        return supervised, {"loss": supervised}
    teacher_BxP = gather(batch["teacher"]) / settings["teacher_temperature"]
    teacher = losses.taught(teacher_BxP, scores_BxP, where_BxP=where_BxP)
    loss = supervised + settings["teacher_weight"] * teacher
    return loss, {"loss": loss, "supervised": supervised, "teacher": teacher}


def joint_loss(
    models: Models, settings: Mapping, params: Params, batch: Batch, key: Array, gather: Gather
) -> Loss:
    """Adds weighted KL, supervised and in-batch terms of both models' scores of the same lists.

    Paper eq. 6 is weight 1 for the KL term and 0 for the in-batch one, the retriever's own listwise
    cross-entropy over all passages of the batch.

    Args:
      settings: the joint stage's (`loss`, the reading of the loss; `kl_weight`; `in_batch_weight`;
        `averaged`, the number of parts whose losses are averaged; `by_part`, whether the batch's
        leading axis counts parts that have one loss together; `train_reranker`, without which the
        re-ranker gets no gradient).
    """

    def read(params: Params, batch: Batch, key: Array) -> tuple[tuple[Array, Array], Array]:
        query_key, passage_key, pair_key = jax.random.split(key, 3)
        vectors = _vectors(models, params["retriever"], batch, query_key, passage_key)
        reranker = params["reranker"]
        if not settings["train_reranker"]:
            reranker, pair_key = jax.lax.stop_gradient(reranker), None
        return vectors, models.reranker_scores(reranker, batch["pairs"], pair_key)

    (vectors, pairs_N), batch = _read(read, params, batch, key, settings["by_part"])
    retriever_BxP = gather(retriever_scores(*vectors))
    _, terms = losses.joint_distillation(
        retriever_BxP,
        gather(pairs_N).reshape(retriever_BxP.shape),
        gather(batch["positive"]),
        where_BxP=gather(batch["where"]),
        **settings["loss"],
    )
    if settings["loss"]["kl_reduction"] == "sum":
        # The parts of a batch are averaged, but this term is a sum over its lists.
        terms["kl"] *= settings["averaged"]
    loss = settings["kl_weight"] * terms["kl"] + terms["supervised"]
    if settings["in_batch_weight"] > 0:
        terms["in_batch"] = _in_batch(vectors, batch, gather)
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
    by_part: bool  # whether the loss gets all parts of a shard at once, and reads them by turns


def make_stage(config: ConfigDict, models: Models, name: str) -> Stage:
    """Returns the stage "retriever", "reranker" or "joint" of a config."""
    settings, parts = config[name], _parts(config, name)
    if config.model.dtype == "float32":
        half = products.half(config.model.products, jax.default_backend())
        models = models.reshaped(half_products=half)
    in_batch = _in_batch_terms(config, name)
    # Every query's loss is over the passages of all parts.
    by_part = in_batch and parts > 1
    how = in_batch, parts, by_part
    if name == "retriever":
        return Stage(partial(retriever_loss, models, by_part), ("retriever",), {}, 1, *how)
    size = settings.list_size
    if name == "reranker":
        loss_fn = partial(reranker_loss, models, settings.to_dict())
        return Stage(loss_fn, ("reranker",), {}, size, *how)
    terms = settings.to_dict() | {"averaged": 1 if by_part else parts, "by_part": by_part}
    rates = {"reranker": settings.reranker_rate if settings.train_reranker else 0.0}
    loss_fn = partial(joint_loss, models, terms)
    return Stage(loss_fn, ("retriever", "reranker"), rates, size, *how)


def _in_batch_terms(config: ConfigDict, name: str) -> bool:
    return name == "retriever" or (name == "joint" and config.joint.in_batch_weight > 0)


def _parts(config: ConfigDict, name: str) -> int:
    """Returns the number of parts in which a device computes its lists of a batch."""
    settings, data = config[name], config.data
    if settings.accumulate:
        return settings.accumulate
    if jax.default_backend() != "cpu" or _in_batch_terms(config, name):
        return 1
    passages = 0 if name == "reranker" else data.train_passage_length
    tokens = data.query_length + settings.list_size * (passages + data.train_pair_length)
    most, shards = max(CPU_TOKENS // tokens, 1), config.mesh.data * config.mesh.fsdp
    return next(
        parts
        for parts in range(1, settings.batch + 1)
        if settings.batch % parts == 0 and settings.batch <= most * parts * shards
    )
