"""Re-ranker scores for retrieved candidates, batched across queries.

Shape suffixes: Q queries, K candidates of a query, R re-ranked ones, N pairs.
"""

import numpy as np
import tqdm

from rqv2_jax.data.tokens import Store, Texts
from rqv2_jax.models.bert import Params
from rqv2_jax.retrieval.stream import Forward, Layout


def scores(
    forward: Forward,
    params: Params,
    store: Store,
    texts: Texts,
    query_rows_Q: np.ndarray,
    passages_QxK: np.ndarray,
) -> np.ndarray:
    """Returns the re-ranker's logit of every candidate [Q, K], float32; 0 of negative rows."""
    real_QxK = passages_QxK >= 0
    if not real_QxK.any():
        return np.zeros(passages_QxK.shape, np.float32)
    queries_N = np.repeat(query_rows_Q, real_QxK.sum(axis=1))
    passages_N = passages_QxK[real_QxK]
    inputs = forward.inputs
    with tqdm.tqdm(desc="re-rank", total=len(queries_N), unit=" pairs") as bar:
        scores_N = forward.run(
            forward.reranker_scores,
            params,
            lengths_N=inputs.pair_lengths(store, texts, queries_N, passages_N),
            layout=layout(forward, store, texts),
            build=lambda part: inputs.pairs(store, texts, queries_N[part], passages_N[part]),
            bar=bar,
        )
    scores_QxK = np.zeros(passages_QxK.shape, np.float32)
    scores_QxK[real_QxK] = scores_N
    return scores_QxK


def layout(forward: Forward, store: Store, texts: Texts) -> Layout:
    """Plans for pairs of a query and any passage, so that every call takes the same shapes."""
    sample_N = store.sample()
    queries_N = np.resize(np.arange(len(texts)), len(sample_N))
    usual_N = forward.inputs.pair_lengths(store, texts, queries_N, sample_N)
    return forward.layout(usual_N, forward.inputs.pair_length)


def merge(top_QxR: np.ndarray, retriever_QxK: np.ndarray) -> np.ndarray:
    """Returns scores [Q, K] that rank the first R candidates by the re-ranker, the others below them.

    `retriever_QxK` are the retriever's scores, best first; the tail keeps their order and their ties.
    """
    depth = top_QxR.shape[1]
    tail = retriever_QxK[:, depth:]
    if not tail.shape[1]:
        return top_QxR
    # Counts distinct scores, because small differences could vanish next to the re-ranker's scores.
    worse = np.cumsum(tail[:, 1:] != tail[:, :-1], axis=1)
    below = top_QxR.min(axis=1, keepdims=True) - 1
    return np.concatenate([top_QxR, below, below - worse], axis=1).astype(np.float32)
