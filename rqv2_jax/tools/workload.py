"""The inputs of a run's steps: texts, their lengths in tokens, and the FLOPs of the models on them.

Shape suffixes: L lists, P passages of a list, N sequences, also those of a list.
"""

import itertools
import pathlib
import tempfile
import time
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rqv2_jax.data import batches, tokens
from rqv2_jax.models import bert, random_model
from rqv2_jax.models.scoring import Models
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.texts import open_collection

# Tokens, special ones included, log-normal: median, deviation, least, most. Passages have their
# titles, and a mean of 79.
MSMARCO = {"queries": (9, 0.35, 4, 32), "passages": (76, 0.36, 16, 128)}
DRAWN_STEPS = 64  # steps whose lists' lengths are drawn

# Lengths in tokens of the sequences of lists [L, 1 or P], by kind of input.
Lengths = dict[str, np.ndarray]


def forward_flops(config: bert.BertConfig, lengths: np.ndarray) -> float:
    """Returns the FLOPs of a plain encoder's products over sequences of these lengths in tokens.

    By layer and token 8 D^2 for attention's projections, 4 D T for attention, 4 D F for the
    feed-forward network.
    """
    d, f = config.hidden_size, config.intermediate_size
    by_token = 8.0 * d**2 + 4.0 * lengths * d + 4.0 * d * f
    return config.num_layers * float((lengths * by_token).sum())


def training_flops(
    config: ConfigDict, models: Models, stage: str, kind: str, lengths: np.ndarray
) -> float:
    """Returns a stage's FLOPs for sequences of one kind: forward, and twice that for the gradient."""
    # In static distillation the re-ranker has none.
    taught = stage != "joint" or kind != "pairs" or config.joint.train_reranker
    return (3 if taught else 1) * forward_flops(encoder(models, kind), lengths)


def encoder(models: Models, kind: str) -> bert.BertConfig:
    """Returns the encoder that reads a kind of input."""
    return models.reranker if kind == "pairs" else models.retriever


def msmarco_lengths(
    rng: np.random.Generator, kind: str, shape: int | tuple[int, ...]
) -> np.ndarray:
    """Draws lengths like those of MS MARCO's "queries" or "passages"."""
    median, deviation, least, most = MSMARCO[kind]
    return np.clip(rng.lognormal(np.log(median), deviation, shape), least, most).astype(int)


def draw_lengths(
    config: ConfigDict, lengths: str, batch: int, size: int, *, training: bool = True
) -> Lengths:
    """Draws the lengths of the sequences of lists of `size` passages, for some batches.

    `lengths` are "full", the most that the config admits, or "msmarco", like those of MS MARCO's texts.
    Those of passages and pairs are cut as in `training`, or else as in search.
    """
    data, counts = config.data, {"queries": 1, "passages": size, "pairs": size}
    passage_length, pair_length = data.passage_length, data.pair_length
    if training:
        passage_length, pair_length = data.train_passage_length, data.train_pair_length
    most = dict(zip(counts, (data.query_length, passage_length, pair_length)))
    if lengths == "full":
        return {kind: np.full((batch, counts[kind]), most[kind]) for kind in most}
    rng, lists = np.random.default_rng(0), DRAWN_STEPS * batch
    drawn = {kind: msmarco_lengths(rng, kind, (lists, counts[kind])) for kind in MSMARCO}
    # Both begin with [CLS], a pair does so once.
    drawn["pairs"] = drawn["queries"] + drawn["passages"] - 1
    drawn = {kind: drawn[kind].clip(max=most[kind]) for kind in most}
    order_L = batches.balance(list(drawn.values()), batch)
    return {kind: lengths_LxN[order_L] for kind, lengths_LxN in drawn.items()}


class Texts(NamedTuple):
    """Passages (title, text) and queries, and their tokens."""

    passages: list[tuple[str, str]]
    queries: list[str]
    store: tokens.Store
    tokenised_in: float  # seconds


def read(run: Run, lengths: str, passages: int, queries: int) -> Texts:
    """Returns the first texts of the collection, or made up ones if `lengths` are not "data"."""
    if lengths == "data":
        with tempfile.TemporaryDirectory() as folder:
            collection = open_collection(run.config.data, pathlib.Path(folder))
            first = itertools.islice(collection.passages(), passages)
            read_passages = [(passage.title, passage.text) for passage in first]
            asked = itertools.islice(collection.queries("train"), queries)
            read_queries = [query.text for query in asked]
    else:
        rng, data = np.random.default_rng(0), run.config.data
        longest = {"passages": max(data.passage_length, data.train_passage_length)}
        longest["queries"] = data.query_length

        def made_up(kind: str, count: int) -> list[str]:
            lengths_N = msmarco_lengths(rng, kind, count)
            lengths_N = lengths_N if lengths == "msmarco" else np.full(count, longest[kind])
            # Two tokens are special ones.
            return [" ".join(rng.choice(random_model.WORDS, length - 2)) for length in lengths_N]

        read_passages = [("", text) for text in made_up("passages", passages)]
        read_queries = made_up("queries", queries)
    started = time.perf_counter()
    titles, bodies, questions = (
        run.tokenizer.texts(list(texts)) for texts in (*zip(*read_passages), read_queries)
    )
    taken = time.perf_counter() - started
    split = tokens.Queries(questions, read_queries, np.zeros((3, 0), np.int64))
    ids = [str(i) for i in range(len(read_passages))]
    store = tokens.Store(titles, bodies, ids, {"train": split}, "")
    return Texts(read_passages, read_queries, store, taken)
