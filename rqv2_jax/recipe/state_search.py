"""Search by the retriever of a model state: its vectors of the corpus, and what it finds.

Shape suffixes: Q queries, K passages of a query, best first, D vector size.
"""

import json
import pathlib
from collections.abc import Callable

import numpy as np

from rqv2_jax import artifacts, hosts
from rqv2_jax.data import own_texts, tokens
from rqv2_jax.ranking import metrics
from rqv2_jax.recipe.run import Run
from rqv2_jax.retrieval import encode, index

# Passage rows [Q, K] and scores [Q, K] of some queries.
Ranking = tuple[np.ndarray, np.ndarray]


def source_of(run: Run, store: tokens.Store, state: str) -> str:
    """Names the corpus as the retriever of a state encodes it."""
    return f"{run.origin(state=state, model='retriever')} {store.fingerprint}"


def cached(path: pathlib.Path, source: str, search: Callable[[], Ranking | None]) -> Ranking | None:
    """Returns a ranking as `artifacts.cached` keeps it; None, on the first host, for none."""

    def compute():
        ranking = search()
        return {} if ranking is None else dict(zip(("passages", "scores"), ranking))

    arrays = artifacts.cached(path, source, compute)
    return (arrays["passages"], arrays["scores"]) if arrays else None


def retrieve(
    run: Run,
    store: tokens.Store,
    queries: tokens.Queries,
    rows_Q: np.ndarray,
    *,
    state: str,
    index_name: str,
) -> Ranking | None:
    """Returns what the retriever of a state finds for some of the queries, by "exact" or "scann".

    K is `config.evaluate.retrieve_depth`. ScaNN searches on the first of several hosts; the others get
    None.
    """
    settings, stage = run.config.evaluate, run.trained_by(state=state, model="retriever")
    source, towers = source_of(run, store, state), run.params(state=state, model="retriever")
    vectors = run.workdir / "vectors" / stage
    shards = encode.corpus(run.forward, towers["passage"], store, vectors, source)
    vectors_QxD = encode.queries(run.forward, towers["query"], queries.texts, rows_Q)
    own_Q = own_texts.of_rows(queries, rows_Q)
    depth = own_texts.deeper(settings.retrieve_depth, own_Q)
    if index_name == "exact":
        ranking = index.exact(vectors_QxD, shards, depth)
    elif hosts.first():
        folder = run.workdir / "index" / stage
        searcher = index.build_scann(shards, settings.scann, depth, folder, source)
        ranking = index.scann_search(searcher, vectors_QxD, depth)
    else:
        return None
    # By the tie rule, so that the re-ranker's cut does not depend on the order of the corpus.
    return own_texts.without(*metrics.sort_run(*ranking, store.passage_ids), own_Q)


def retrieve_split(
    run: Run, store: tokens.Store, split: str, rows_Q: np.ndarray, *, state: str, index_name: str
) -> tuple[Ranking, dict[str, float]]:
    """Returns what `retrieve` finds for queries of a split, kept in `eval/`, and ScaNN's recall."""
    settings, queries = run.config.evaluate, store.splits[split]
    stage = run.trained_by(state=state, model="retriever")
    source = f"{source_of(run, store, state)} {queries.fingerprint} "
    source += f"{settings.queries} {settings.retrieve_depth}"

    def by(name: str, source: str) -> Ranking:
        how = {"state": state, "index_name": name}
        path = run.workdir / "eval" / f"{split}.{stage}.{name}.npz"
        return cached(path, source, lambda: retrieve(run, store, queries, rows_Q, **how))

    exact = by("exact", source)
    if index_name == "exact":
        return exact, {}
    built_by = json.dumps(settings.scann.to_dict(), sort_keys=True)
    approximate = by("scann", f"{source} {built_by}")
    recalls = {
        f"recall@{depth} against exact": index.recall(
            approximate[0][:, :depth], exact[0][:, :depth]
        )
        for depth in (10, 100)
    }
    return approximate, recalls
