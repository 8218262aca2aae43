"""Re-ranker scores for retrieved candidates, batched across queries.

Shape suffixes: Q queries, K candidates of a query.
"""

import numpy as np
import tqdm

from rqv2_jax.data.inputs import Inputs
from rqv2_jax.data.tokens import Store, Texts
from rqv2_jax.models import Models
from rqv2_jax.retrieval import stream
from rqv2_jax.sharding import Sharding


def scores(
    models: Models,
    params,
    store: Store,
    texts: Texts,
    query_rows_Q: np.ndarray,
    passages_QxK: np.ndarray,
    inputs: Inputs,
    sharding: Sharding,
    batch_tokens: int,
) -> np.ndarray:
    """The re-ranker's logit of every candidate [Q, K], float32. `passages_QxK` are row numbers."""
    queries_N = np.repeat(query_rows_Q, passages_QxK.shape[1])
    passages_N = passages_QxK.reshape(-1)
    lengths_N = inputs.pair_lengths(store, texts, queries_N, passages_N)
    with tqdm.tqdm(desc="re-rank", total=len(queries_N), unit=" pairs") as bar:
        scores_N = stream.run(
            sharding.per_shard(models.reranker_scores),
            params,
            sharding,
            lengths_N=lengths_N,
            widths=stream.row_widths(lengths_N),
            build=lambda part: inputs.pairs(store, texts, queries_N[part], passages_N[part]),
            batch_tokens=batch_tokens,
            bar=bar,
        )
    return scores_N.reshape(passages_QxK.shape)
