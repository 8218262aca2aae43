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


@dataclasses.dataclass(frozen=True)
class _Mine:
    """Candidates in a folder of a run, with the name of the models and the corpus they come from."""

    run: Run
    store: tokens.Store
    folder: pathlib.Path
    source: str

    def retrieve(
        self, rows: dict[str, np.ndarray], vectors: pathlib.Path, retriever: Callable[[], dict]
    ) -> Candidates:
        """Returns the top passages of the queries in `rows`, by split.

        `retriever()` gives the params; the corpus by them lies in the folder `vectors`.
        """
        config, forward = self.run.config, self.run.forward

        def candidates(split: str, depth: int) -> lists_lib.Candidates:
            rows_Q, queries = rows[split], self.store.splits[split]

            def compute():
                towers, own_Q = retriever(), own_texts.of_rows(queries, rows_Q)
                vectors_QxD = encode.queries(forward, towers["query"], queries.texts, rows_Q)
                passages = towers["passage"], self.store, vectors, self.source
                shards = encode.corpus(forward, *passages)
                ranking = index.exact(vectors_QxD, shards, own_texts.deeper(depth, own_Q))
                passages_QxN, scores_QxN = own_texts.without(*ranking, own_Q)
                return {"query_rows": rows_Q, "passages": passages_QxN, "scores": scores_QxN}

            path = self.folder / f"{split}.retrieved.npz"
            kept = artifacts.cached(path, self.source, compute)
            arrays = [kept[name] for name in ("query_rows", "passages", "scores")]
            return lists_lib.Candidates(*arrays, np.full(arrays[2].shape, np.nan, np.float32))

        depths = {"train": config.mine.depth, "dev": config.dev.depth}
        return {split: candidates(split, depths[split]) for split in rows}

    def score(self, candidates: Candidates, reranker: Callable[[], dict]) -> Candidates:
        """Returns the candidates with scores by the params `reranker()`, asked for only if needed.

        Those that `config.mine` says and all of the dev queries get one, the others keep NaN; none does
        unless joint lists are to be denoised.
        """
        config, reranker = self.run.config, functools.cache(reranker)
        if config.joint.denoised_share == 0:
            return candidates

        def scored(split: str, queries: int, depth: int) -> lists_lib.Candidates:
            first, texts = candidates[split].first(queries, depth), self.store.splits[split].texts
            parts = []
            for start in range(0, len(first.query_rows_Q), MINED_AT_ONCE):
                part = slice(start, start + MINED_AT_ONCE)
                pairs = self.store, texts, first.query_rows_Q[part], first.passages_QxN[part]
                path = self.folder / f"{split}.scores" / f"{start // MINED_AT_ONCE:05}.npz"
                kept = artifacts.cached(
                    path,
                    self.source,
                    lambda pairs=pairs: {
                        "scores": rerank.scores(self.run.forward, reranker(), *pairs)
                    },
                )
                parts.append(kept["scores"])
            reranker_QxN = candidates[split].reranker_QxN.copy()
            reranker_QxN[:queries, :depth] = np.concatenate(parts)
            return dataclasses.replace(candidates[split], reranker_QxN=reranker_QxN)

        most = {
            "train": (config.mine.scored_queries, config.mine.scored_depth),
            "dev": (config.dev.queries, config.dev.depth),
        }
        return {split: scored(split, *most[split]) for split in candidates}


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
    kept = _Mine(run, store, run.workdir / "lists", source_of(run, store, "retriever"))
    return kept.retrieve(rows, vectors, functools.partial(run.params, **warm))


def mine(run: Run, store: tokens.Store, candidates: Candidates) -> Candidates:
    """Returns the candidates with the warmed-up re-ranker's scores, kept in `lists/`."""
    kept = _Mine(run, store, run.workdir / "lists", f"{warmed_up(run)} {store.fingerprint}")
    return kept.score(candidates, lambda: run.params(state="reranker", model="reranker"))


def warmed_up(run: Run) -> str:
    """Names the params of both warmed-up models."""
    models = ("retriever", "reranker")
    return " ".join(run.origin(state="reranker", model=model) for model in models)


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
    run: Run, store: tokens.Store, candidates: Candidates, step: int, params: dict | None
) -> Candidates:
    """Returns new candidates of the same queries by both models as they are at a step.

    They are kept in `lists/`. A run that resumes at a later step has no `params` of this one (None),
    and reads its candidates there.

    Raises:
      InputError: then they are not there, or damaged.
    """
    folder = run.workdir / "lists" / f"joint.{step:07}"

    def model(name: str) -> dict[str, Any]:
        if params is None:
            raise InputError(
                f"{folder}: the candidates of step {step} are gone, the models have changed; delete "
                f"{run.workdir / 'joint'} to train this stage again"
            )
        return params[name]

    kept = _Mine(run, store, folder, f"joint {step} {store.fingerprint}")
    rows = {split: each.query_rows_Q for split, each in candidates.items()}
    vectors = run.workdir / "vectors" / "refreshed"
    new = kept.retrieve(rows, vectors, lambda: model("retriever"))
    return kept.score(new, lambda: model("reranker"))
