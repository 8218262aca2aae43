"""Floors that training has to beat: BM25, and the starting retriever as its folder describes it.

Shape suffixes: Q queries, D vector size.
"""

import dataclasses
import json

import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts, optional
from rqv2_jax.data import own_texts, tokens
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import metrics
from rqv2_jax.recipe.run import Run, as_released
from rqv2_jax.recipe.state_search import Ranking, cached, retrieve_split
from rqv2_jax.recipe.texts import texts_of
from rqv2_jax.retrieval import bm25, encode, index


def _too_large(name: str, most: int, store: tokens.Store) -> bool:
    """Says, in a line too, whether a floor is left out because there are too many passages."""
    passages = len(store.passage_ids)
    if passages > most:
        tqdm.tqdm.write(
            f"  {name}: left out, as {passages} passages are more than "
            f"config.evaluate.{name}.most_passages, {most}"
        )
    return passages > most


def _reading(run: Run) -> tuple:
    """Returns what decides how the retriever of a run reads and scores texts."""
    inputs = dataclasses.replace(run.inputs, pair_length=0, pair_cls=0, pair_sep=0)
    return inputs, run.models.retriever, run.models.pooling, run.models.similarity


def by_released(run: Run, store: tokens.Store, split: str, rows_Q: np.ndarray) -> Ranking | None:
    """Returns what the starting retriever finds at its own length and similarity, by exact search.

    None, with a line that says why, where it is left out.
    """
    queries, settings = store.splits[split], run.config.evaluate
    if _too_large("released", settings.released.most_passages, store):
        return None
    try:
        released = as_released(run)
    except InputError as e:
        tqdm.tqdm.write(f"  released: left out, as the folder cannot be read as it is ({e})")
        return None
    if _reading(released) == _reading(run):
        where = {"state": "zero_shot", "index_name": "exact"}
        return retrieve_split(run, store, split, rows_Q, **where)[0]
    own_Q = own_texts.of_rows(queries, rows_Q)
    source = f"released {run.weights_hash} {store.fingerprint} {_reading(released)} "

    def search():
        forward, length = released.forward, released.inputs.passage_length
        tqdm.tqdm.write(f"  released: the starting model at {length} tokens")
        towers, folder = released.initial("retriever"), run.workdir / "vectors" / "released"
        shards = encode.corpus(forward, towers["passage"], store, folder, source)
        vectors_QxD = encode.queries(forward, towers["query"], queries.texts, rows_Q)
        depth = own_texts.deeper(settings.retrieve_depth, own_Q)
        ranking = metrics.sort_run(*index.exact(vectors_QxD, shards, depth), store.passage_ids)
        return own_texts.without(*ranking, own_Q)

    asked = f"{source} {queries.fingerprint} {settings.retrieve_depth}"
    path = run.workdir / "eval" / f"{split}.released.npz"
    return cached(path, artifacts.digest(asked, rows_Q, own_Q), search)


def by_bm25(run: Run, store: tokens.Store, split: str, rows_Q: np.ndarray) -> Ranking | None:
    """Returns what BM25 finds; None, with a line that says why, where it is left out."""
    settings, queries, titles = run.config.evaluate, store.splits[split], run.config.data.titles
    if _too_large("bm25", settings.bm25.most_passages, store):
        return None
    try:
        for package in bm25.PACKAGES:
            optional.load(package, "the floor BM25")
    except InputError as e:
        tqdm.tqdm.write(f"  bm25: left out ({e})")
        return None
    own_Q = own_texts.of_rows(queries, rows_Q)

    def search():
        if not hosts.first():
            return None
        try:
            texts = texts_of(run, store.fingerprint)
        except InputError as e:
            tqdm.tqdm.write(f"  bm25: left out, as the texts cannot be read ({e})")
            return None
        strings = queries.strings or tuple(query.text for query in texts.queries(split))
        passages = (f"{p.title} {p.text}" if titles else p.text for p in texts.passages())
        depth = own_texts.deeper(settings.retrieve_depth, own_Q)
        ranking = bm25.search(passages, [strings[row] for row in rows_Q], depth, settings.bm25)
        ranking = own_texts.without(*ranking, own_Q)
        if (ranking[0] < 0).all():
            tqdm.tqdm.write(
                "  bm25: left out, as no query has a word of a passage; words are runs of two letters "
                "or more, which does not do for languages written without spaces"
            )
            return None
        return metrics.sort_run(*ranking, store.passage_ids)

    method = json.dumps(bm25.described(settings.bm25), sort_keys=True)
    source = f"{store.fingerprint} {queries.fingerprint} {method} {titles} "
    source = artifacts.digest(source + str(settings.retrieve_depth), rows_Q, own_Q)
    return cached(run.workdir / "eval" / f"{split}.bm25.npz", source, search)
