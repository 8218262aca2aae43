"""Scores of both models on dev queries, by which training keeps its best params.

Shape suffixes: Q queries, K passages of a query, N passages of the pool, D vector size.
"""

from typing import Any

import ml_collections
import numpy as np

from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import own_texts, tokens
from rqv2_jax.ranking import metrics
from rqv2_jax.retrieval import encode, index, rerank
from rqv2_jax.retrieval.stream import Forward

DEV_METRIC = "RR@10"


class Dev:
    """Measures both models on dev queries during training, on a fixed pool of passages.

    The retriever ranks a pool: the positives of the dev queries, their candidates if there are any,
    and random passages up to `config.dev.pool`. The re-ranker re-ranks each query's candidates.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        forward: Forward,
        store: tokens.Store,
        candidates: lists_lib.Candidates | None,
    ):
        self.forward, self.store, self.candidates = forward, store, candidates
        self.queries = store.splits["dev"]
        if candidates is None:
            rows_Q = lists_lib.subset(len(self.queries.ids), config.dev.queries, config.seed)
        else:
            rows_Q = candidates.query_rows_Q
        self.rows_Q = np.sort(rows_Q)
        self.qrels = self.queries.labels_of(self.rows_Q)
        pool = self.qrels[1][self.qrels[2] > 0]
        if candidates is not None:
            pool = np.append(pool, candidates.passages_QxN.reshape(-1))
        pool = np.unique(pool)
        others = np.setdiff1d(np.arange(len(store.passage_ids)), pool)
        others = np.random.default_rng(config.seed).permutation(others)
        fill = max(config.dev.pool - len(pool), 0)
        self.pool_N = np.sort(np.append(pool, others[:fill]))

    def scores(self, params: dict[str, Any]) -> dict[str, float]:
        """Returns `DEV_METRIC` of each model whose params these are."""
        measures = {"retriever": self.retriever, "reranker": self.reranker}
        return {model: measures[model](tree) for model, tree in params.items()}

    def retriever(self, params: dict[str, Any]) -> float:
        """Returns RR@10 of the retriever over the pool."""
        passages_NxD = encode.passages(self.forward, params["passage"], self.store, self.pool_N)
        queries_QxD = encode.queries(self.forward, params["query"], self.queries.texts, self.rows_Q)
        own_Q = own_texts.of_rows(self.queries, self.rows_Q)
        depth = own_texts.deeper(10, own_Q)
        rows_QxK, scores_QxK = index.exact(queries_QxD, [passages_NxD], depth)
        return self._score(*own_texts.without(self.pool_N[rows_QxK], scores_QxK, own_Q))

    def reranker(self, params: dict[str, Any]) -> float:
        """Returns RR@10 of the re-ranker over each query's candidates."""
        order_Q = np.argsort(self.candidates.query_rows_Q)
        passages_QxK = self.candidates.passages_QxN[order_Q]
        scores_QxK = rerank.scores(
            self.forward, params, self.store, self.queries.texts, self.rows_Q, passages_QxK
        )
        return self._score(passages_QxK, scores_QxK)

    def _score(self, passages_QxK: np.ndarray, scores_QxK: np.ndarray) -> float:
        if np.isnan(scores_QxK).any():
            # Training stops at it with a message that names the stage and the step.
            return np.nan
        values = metrics.evaluate(
            passages_QxK, scores_QxK, self.store.passage_ids, self.qrels, [DEV_METRIC]
        )
        return float(values[DEV_METRIC].mean())
