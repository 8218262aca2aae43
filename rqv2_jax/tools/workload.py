"""The inputs of a run's steps: their lengths in tokens, and the FLOPs of the models on them.

Shape suffixes: L lists, P passages of a list, N sequences of a list.
"""

import numpy as np
from ml_collections import ConfigDict

from rqv2_jax.data import batches as batches_lib
from rqv2_jax.models import bert
from rqv2_jax.models.scoring import Models

# Tokens, special ones included, log-normal: median, deviation, least, most. Passages have their
# titles, and a mean of 79.
MSMARCO = {"queries": (9, 0.35, 4, 32), "passages": (76, 0.36, 16, 128)}
DRAWN_STEPS = 64  # steps whose lists' lengths are drawn

# Lengths in tokens of the sequences of lists [L, 1 or P], by kind of input.
Lengths = dict[str, np.ndarray]


def forward_flops(
    config: bert.BertConfig, rows: int, width: int | np.ndarray
) -> float | np.ndarray:
    """Returns the FLOPs of a plain encoder's products over `rows` sequences of `width` tokens.

    By layer and token 8 D^2 for attention's projections, 4 D T for attention, 4 D F for the
    feed-forward network.
    """
    d, f = config.hidden_size, config.intermediate_size
    return config.num_layers * rows * width * (8.0 * d**2 + 4.0 * width * d + 4.0 * d * f)


def training_flops(
    config: ConfigDict, models: Models, stage: str, kind: str, lengths: np.ndarray
) -> float:
    """Returns a stage's FLOPs for sequences of one kind: forward, and twice that for the gradient.

    In static distillation the re-ranker has no gradient.
    """
    taught = stage != "joint" or kind != "pairs" or config.joint.train_reranker
    return (3 if taught else 1) * float(forward_flops(encoder(models, kind), 1, lengths).sum())


def encoder(models: Models, kind: str) -> bert.BertConfig:
    """Returns the encoder that reads a kind of input."""
    return models.reranker if kind == "pairs" else models.retriever


def msmarco_lengths(
    rng: np.random.Generator, kind: str, shape: int | tuple[int, ...]
) -> np.ndarray:
    """Draws lengths like those of MS MARCO's "queries" or "passages"."""
    median, deviation, least, most = MSMARCO[kind]
    return np.clip(rng.lognormal(np.log(median), deviation, shape), least, most).astype(int)


def draw_lengths(config: ConfigDict, lengths: str, batch: int, size: int) -> Lengths:
    """Draws the lengths of the sequences of some batches' lists.

    Args:
      lengths: "full", the most that the config admits, or "msmarco", like those of MS MARCO's texts.
      size: passages of a list.
    """
    data, counts = config.data, {"queries": 1, "passages": size, "pairs": size}
    most = dict(zip(counts, (data.query_length, data.passage_length, data.pair_length)))
    if lengths == "full":
        return {kind: np.full((batch, counts[kind]), most[kind]) for kind in most}
    rng, lists = np.random.default_rng(0), DRAWN_STEPS * batch
    drawn = {kind: msmarco_lengths(rng, kind, (lists, counts[kind])) for kind in MSMARCO}
    # Both begin with [CLS], a pair does so once.
    drawn["pairs"] = drawn["queries"] + drawn["passages"] - 1
    drawn = {kind: drawn[kind].clip(max=most[kind]) for kind in most}
    order_L = batches_lib.balance(list(drawn.values()), batch)
    return {kind: lengths_LxN[order_L] for kind, lengths_LxN in drawn.items()}
