"""Ranking losses on arrays of scores, in float32, with finite gradients for any scores but NaN.

`where_BxP` says everywhere which passages exist; the others neither score nor get a gradient.

Shape suffixes: B lists (queries), P passages of a list.
"""

import jax
import jax.numpy as jnp

KL_DIRECTIONS = ("retriever_to_reranker", "reranker_to_retriever")
KL_REDUCTIONS = ("sum", "mean_per_list", "mean_per_candidate")
RERANKER_LOSSES = ("listwise", "pointwise")

# Scores are clipped here, so that their squares and their sums over any batch are finite in float32.
LARGEST = 1e15


def _bounded(scores_BxP: jax.Array) -> jax.Array:
    return jnp.clip(scores_BxP.astype(jnp.float32), -LARGEST, LARGEST)


def _log_softmax(scores_BxP: jax.Array, where_BxP: jax.Array) -> jax.Array:
    """Returns log-probabilities over the passages that exist; the others get a finite, very low one."""
    # Far below every score, so that missing passages take no probability however low the scores are.
    lowest = jnp.finfo(jnp.float32).min / 4
    return jax.nn.log_softmax(jnp.where(where_BxP, _bounded(scores_BxP), lowest))


def _mean(values_B: jax.Array, valid_B: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(valid_B, values_B, 0.0)) / jnp.maximum(jnp.sum(valid_B), 1)


def listwise(scores_BxP: jax.Array, positive_BxP: jax.Array, *, where_BxP: jax.Array) -> jax.Array:
    """Returns the listwise cross-entropy (paper eq. 5): mean over lists of -log softmax of a positive.

    Of several positives each competes with all other passages, and their mean counts. Lists without
    one are left out.
    """
    positive_BxP = positive_BxP & where_BxP
    log_p_BxP = _log_softmax(scores_BxP, where_BxP)
    loss_B = -jnp.sum(jnp.where(positive_BxP, log_p_BxP, 0.0), axis=-1)
    count_B = jnp.sum(positive_BxP, axis=-1)
    return _mean(loss_B / jnp.maximum(count_B, 1), count_B > 0)


def pointwise(scores_BxP: jax.Array, positive_BxP: jax.Array, *, where_BxP: jax.Array) -> jax.Array:
    """Returns the binary cross-entropy of single passages, mean over those that exist."""
    scores_BxP = _bounded(scores_BxP)
    signed_BxP = jnp.where(positive_BxP, scores_BxP, -scores_BxP)
    return _mean(-jax.nn.log_sigmoid(jnp.where(where_BxP, signed_BxP, 0.0)), where_BxP)


def kl(p_log_BxP: jax.Array, q_log_BxP: jax.Array, *, where_BxP: jax.Array) -> jax.Array:
    """Returns KL(p || q) of every list [B] from log-probabilities."""
    p_BxP = jnp.exp(p_log_BxP)
    return jnp.sum(jnp.where(where_BxP, p_BxP * (p_log_BxP - q_log_BxP), 0.0), axis=-1)


def taught(teacher_BxP: jax.Array, scores_BxP: jax.Array, *, where_BxP: jax.Array) -> jax.Array:
    """Returns KL(teacher || scores) over the passages that both score, mean over lists.

    A teacher's score is NaN where it has none.
    """
    where_BxP = where_BxP & ~jnp.isnan(teacher_BxP)
    teacher_log_BxP, log_BxP = (_log_softmax(x, where_BxP) for x in (teacher_BxP, scores_BxP))
    kl_B = kl(teacher_log_BxP, log_BxP, where_BxP=where_BxP)
    return _mean(kl_B, jnp.any(where_BxP, axis=-1))


def entropy(log_p_BxP: jax.Array, *, where_BxP: jax.Array) -> jax.Array:
    """Returns the entropy of every list [B] in nats, from log-probabilities."""
    return -jnp.sum(jnp.where(where_BxP, jnp.exp(log_p_BxP) * log_p_BxP, 0.0), axis=-1)


# size: nine parameters, the last five of them given as `**config.joint.loss`.
def joint_distillation(
    retriever_BxP: jax.Array,
    reranker_BxP: jax.Array,
    positive_BxP: jax.Array,
    *,
    where_BxP: jax.Array,
    kl_direction: str,
    kl_reduction: str,
    teacher_gradient: bool,
    temperature: float,
    reranker_loss: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes dynamic listwise distillation (paper eq. 4 to 6): KL term plus the re-ranker's own loss.

    Args:
      retriever_BxP: retriever scores (dot products).
      reranker_BxP: re-ranker scores (logits) of the same passages.
      positive_BxP: the labelled passage of each list.
      where_BxP: which passages exist.
      kl_direction: "retriever_to_reranker" is KL(retriever || re-ranker) (paper eq. 4),
        "reranker_to_retriever" is KL(re-ranker || retriever) (the released code).
      kl_reduction: "sum" over lists (paper), "mean_per_list", or "mean_per_candidate" over all
        passages that exist (the released code).
      teacher_gradient: whether the KL term changes the re-ranker too (implied by the paper) or only
        the retriever (the released code).
      temperature: both score lists are divided by it inside the KL term.
      reranker_loss: "listwise" (paper eq. 5) or "pointwise" (its ablation).

    Returns:
      (loss, terms): a float32 scalar, and scalars to watch: the loss, both of its terms, and the mean
      entropy in nats of both models' distributions; near 0 their softmax is saturated and frozen.
    """
    for name, value, known in (
        ("kl_direction", kl_direction, KL_DIRECTIONS),
        ("kl_reduction", kl_reduction, KL_REDUCTIONS),
        ("reranker_loss", reranker_loss, RERANKER_LOSSES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; choose one of {known}")

    retriever_BxP, reranker_BxP = (x.astype(jnp.float32) for x in (retriever_BxP, reranker_BxP))
    retriever_log_BxP = _log_softmax(retriever_BxP / temperature, where_BxP)
    reranker_log_BxP = _log_softmax(reranker_BxP / temperature, where_BxP)
    teacher_log_BxP = reranker_log_BxP
    if not teacher_gradient:
        teacher_log_BxP = jax.lax.stop_gradient(reranker_log_BxP)
    if kl_direction == "retriever_to_reranker":
        kl_B = kl(retriever_log_BxP, teacher_log_BxP, where_BxP=where_BxP)
    else:
        kl_B = kl(teacher_log_BxP, retriever_log_BxP, where_BxP=where_BxP)
    valid_B = jnp.any(where_BxP, axis=-1)
    kl_term = {
        "sum": lambda: jnp.sum(kl_B),
        "mean_per_list": lambda: _mean(kl_B, valid_B),
        "mean_per_candidate": lambda: jnp.sum(kl_B) / jnp.maximum(jnp.sum(where_BxP), 1),
    }[kl_reduction]()

    supervised = {"listwise": listwise, "pointwise": pointwise}[reranker_loss]
    supervised_term = supervised(reranker_BxP, positive_BxP, where_BxP=where_BxP)
    loss = kl_term + supervised_term
    terms = {
        "loss": loss,
        "kl": kl_term,
        "supervised": supervised_term,
        "retriever_entropy": _mean(entropy(retriever_log_BxP, where_BxP=where_BxP), valid_B),
        "reranker_entropy": _mean(entropy(reranker_log_BxP, where_BxP=where_BxP), valid_B),
    }
    return loss, terms
