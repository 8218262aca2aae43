"""A trained run in Python: scores of given passages for a query, and search, by both models.

Example:
  scorer = score.open_scorer("workdir/quickstart", "joint")
  retriever_P, reranker_P = scorer("sort an array", [("numpy sort", "Return a sorted copy ...")])

Shape suffixes: Q queries, P given passages, K passages found, R re-ranked of these, D vector size.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rqv2_jax.data import tokens
from rqv2_jax.models.scoring import tower
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.recipe.rankings import open_retriever
from rqv2_jax.recipe.run import Run
from rqv2_jax.retrieval import encode, rerank


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Both models of one state of a run, restored from its orbax checkpoint."""

    run: Run
    retriever: Any
    reranker: Any

    def __call__(
        self, query: str, passages: Sequence[tuple[str | None, str | None]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns retriever and re-ranker scores [P], float32, of P passages given as (title, text).

        P may be 0; a title or text that is None is none. The retriever's are dot products or cosines,
        the re-ranker's logits.
        """
        if not passages:
            return np.zeros(0, np.float32), np.zeros(0, np.float32)
        encode_texts = self.run.tokenizer.texts
        store = tokens.Store(
            titles=encode_texts([title or "" for title, _ in passages]),
            texts=encode_texts([text or "" for _, text in passages]),
            passage_ids=[str(i) for i in range(len(passages))],
            splits={},
            fingerprint="",
        )
        queries, rows_P, row_1 = encode_texts([query]), np.arange(len(passages)), np.arange(1)
        forward = self.run.forward
        query_1xD = encode.queries(forward, tower(self.retriever, "query"), queries, row_1)
        passages_PxD = encode.passages(forward, tower(self.retriever, "passage"), store, rows_P)
        reranker_1xP = rerank.scores(forward, self.reranker, store, queries, row_1, rows_P[None])
        return passages_PxD @ query_1xD[0], reranker_1xP[0]


def open_scorer(
    workdir: str, state: str, *, weights: str = "", reranker_weights: str = ""
) -> Scorer:
    """Opens the models of a workdir in a state: "reranker" (both warmed up) or "joint".

    Weights that have moved since are given as for `open_workdir`. Raises InputError as that does, and
    for a state that has not been reached.
    """
    places = {"weights": weights, "reranker_weights": reranker_weights}
    run = open_workdir(pathlib.Path(workdir), **places)
    models = (run.params(state=state, model=model) for model in ("retriever", "reranker"))
    return Scorer(run, *models)


def open_search(
    run: Run, store: tokens.Store, *, state: str, index_name: str
) -> Callable[[tokens.Queries], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Loads both models of a state of a run, "reranker" or "joint", to search again and again.

    The search takes queries and returns (passage rows [Q, K], retriever scores [Q, K], re-ranker scores
    [Q, R]), the best by the retriever first; K is `config.evaluate.retrieve_depth`, R `rerank_depth`.
    """
    params, depth = run.params(state=state, model="reranker"), run.config.evaluate.rerank_depth
    retrieve = open_retriever(run, store, state=state, index_name=index_name)

    def search(queries: tokens.Queries) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows_Q = np.arange(len(queries.ids))
        passages_QxK, retriever_QxK = retrieve(queries, rows_Q)
        pairs = store, queries.texts, rows_Q, passages_QxK[:, :depth]
        return passages_QxK, retriever_QxK, rerank.scores(run.forward, params, *pairs)

    return search
