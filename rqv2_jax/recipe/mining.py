"""Candidates by both models: passages that a retriever finds and a re-ranker scores.

Shape suffixes: Q queries, N candidates of a query, D vector size.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from rqv2_jax import artifacts
from rqv2_jax.data import collection, own_texts, tokens
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.errors import InputError
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.state_search import source_of
from rqv2_jax.recipe.texts import open_store, texts_of
from rqv2_jax.retrieval import encode, index, rerank

MINED_AT_ONCE = 1024

# By split, "train" and "dev".
Candidates = dict[str, lists_lib.Candidates]


def _retrieve(
    run: Run,
    store: tokens.Store,
    folder: pathlib.Path,
    source: str,
    rows: dict[str, np.ndarray],
    vectors: pathlib.Path,
    retriever: Callable[[], dict[str, Any]],
) -> Candidates:
    """Returns the top passages of the queries in `rows`, by split, kept in a folder.

    `retriever()` gives the params, which `source` names with the corpus; the corpus by them lies in
    the folder `vectors`.
    """

    def candidates(split: str, depth: int) -> lists_lib.Candidates:
        rows_Q, queries = rows[split], store.splits[split]

        def compute():
            towers = retriever()
            vectors_QxD = encode.queries(run.forward, towers["query"], queries.texts, rows_Q)
            own_Q = own_texts.of_rows(queries, rows_Q)
            shards = encode.corpus(run.forward, towers["passage"], store, vectors, source)
            ranking = index.exact(vectors_QxD, shards, own_texts.deeper(depth, own_Q))
            passages_QxN, scores_QxN = own_texts.without(*ranking, own_Q)
            return {"query_rows": rows_Q, "passages": passages_QxN, "scores": scores_QxN}

        kept = artifacts.cached(folder / f"{split}.retrieved.npz", source, compute)
        arrays = [kept[name] for name in ("query_rows", "passages", "scores")]
        return lists_lib.Candidates(*arrays, np.full(arrays[2].shape, np.nan, np.float32))

    depths = {"train": run.config.mine.depth, "dev": run.config.dev.depth}
    return {split: candidates(split, depths[split]) for split in rows}


def _score(
    run: Run,
    store: tokens.Store,
    candidates: Candidates,
    folder: pathlib.Path,
    source: str,
    reranker: Callable[[], Any],
) -> Candidates:
    """Returns the candidates with scores, kept in a folder under the name `source`.

    Those that `config.mine` says and all of the dev queries get one, the others keep NaN; none does
    unless joint lists are to be denoised.

    Args:
      reranker: gives the re-ranker's params; called only if a score is missing.
    """
    reranker = functools.cache(reranker)

    def scored(split, candidates, queries, depth):
        first, texts, parts = candidates.first(queries, depth), store.splits[split].texts, []
        for start in range(0, len(first.query_rows_Q), MINED_AT_ONCE):
            rows_Q = first.query_rows_Q[start : start + MINED_AT_ONCE]
            passages_QxN = first.passages_QxN[start : start + MINED_AT_ONCE]

            def compute(rows_Q=rows_Q, passages_QxN=passages_QxN):
                pairs = store, texts, rows_Q, passages_QxN
                return {"scores": rerank.scores(run.forward, reranker(), *pairs)}

            path = folder / f"{split}.scores" / f"{start // MINED_AT_ONCE:05}.npz"
            parts.append(artifacts.cached(path, source, compute)["scores"])
        reranker_QxN = candidates.reranker_QxN.copy()
        reranker_QxN[:queries, :depth] = np.concatenate(parts)
        return dataclasses.replace(candidates, reranker_QxN=reranker_QxN)

    if run.config.joint.denoised_share == 0:
        return candidates
    most = {
        "train": (run.config.mine.scored_queries, run.config.mine.scored_depth),
        "dev": (run.config.dev.queries, run.config.dev.depth),
    }
    return {split: scored(split, each, *most[split]) for split, each in candidates.items()}


def retrieve(run: Run, store: tokens.Store) -> Candidates:
    """Returns the warmed-up retriever's top passages for training and dev queries, kept in `lists/`.

    Dev queries only, if no training lists are drawn from the others.
    """
    most = {"dev": run.config.dev.queries}
    if run.config.reranker.epochs > 0 or not run.config.joint.lists:
        most = {"train": run.config.mine.queries, **most}
    rows = {
        split: lists_lib.subset(len(store.splits[split].ids), count, run.config.seed)
        for split, count in most.items()
    }
    warm = {"state": "retriever", "model": "retriever"}
    vectors = run.workdir / "vectors" / run.trained_by(**warm)
    source, retriever = source_of(run, store, "retriever"), functools.partial(run.params, **warm)
    return _retrieve(run, store, run.workdir / "lists", source, rows, vectors, retriever)


def mine(run: Run, store: tokens.Store, candidates: Candidates) -> Candidates:
    """Returns the candidates with the warmed-up re-ranker's scores, kept in `lists/`."""
    source = f"{warmed_up(run)} {store.fingerprint}"
    scorer = functools.partial(run.params, state="reranker", model="reranker")
    return _score(run, store, candidates, run.workdir / "lists", source, scorer)


def warmed_up(run: Run) -> str:
    """Names the params of both warmed-up models."""
    return " ".join(
        run.origin(state="reranker", model=model) for model in ("retriever", "reranker")
    )


def mined(run: Run) -> tuple[tokens.Store, Candidates, collection.Collection]:
    """Opens the token store, the candidates and the texts of a workdir that has finished mining.

    Raises:
      InputError: it has not, or the texts have changed since.
    """
    lists, share = run.workdir / "lists", run.config.joint.denoised_share
    if not (lists / ("dev.scores" if share > 0 else "dev.retrieved.npz")).exists():
        raise InputError(
            f"{lists}: holds no candidates yet; run rqv2_jax.main up to joint training"
        )
    store = open_store(run)
    texts = texts_of(run, store.fingerprint)
    return store, mine(run, store, retrieve(run, store)), texts


def refresh(
    run: Run,
    store: tokens.Store,
    candidates: Candidates,
    step: int,
    params: dict[str, Any] | None,
) -> Candidates:
    """Returns new candidates of the same queries by both models as they are at a step.

    They are kept in `lists/`. A run that resumes at a later step has no `params` of this one (None),
    and reads its candidates there.

    Raises:
      InputError: then they are not there, or damaged.
    """
    folder, source = run.workdir / "lists" / f"joint.{step:07}", f"joint {step} {store.fingerprint}"

    def model(name):
        if params is None:
            raise InputError(
                f"{folder}: the candidates of step {step} are gone, the models have changed; delete "
                f"{run.workdir / 'joint'} to train this stage again"
            )
        return params[name]

    rows, vectors = {s: c.query_rows_Q for s, c in candidates.items()}, run.workdir / "vectors"
    retriever, reranker = (functools.partial(model, name) for name in ("retriever", "reranker"))
    new = _retrieve(run, store, folder, source, rows, vectors / "refreshed", retriever)
    return _score(run, store, new, folder, source, reranker)
