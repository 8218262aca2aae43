"""A trained run as a Python object: scores of passages for a query, by both models.

Example:
  scorer = score.open_scorer("workdir/quickstart", "joint")
  retriever_P, reranker_P = scorer("sort an array", [("numpy sort", "Return a sorted copy ...")])
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rqv2_jax.data import tokens
from rqv2_jax.retrieval import encode, rerank
from rqv2_jax.workdir import Run, open_workdir


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Both models of one state of a run, restored from its orbax checkpoint."""

    run: Run
    retriever: Any
    reranker: Any

    def __call__(
        self, query: str, passages: Sequence[tuple[str, str]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Retriever and re-ranker scores [P], float32, of P passages given as (title, text)."""
        encode_texts = self.run.tokenizer.texts
        store = tokens.Store(
            titles=encode_texts([title for title, _ in passages]),
            texts=encode_texts([text for _, text in passages]),
            passage_ids=[str(i) for i in range(len(passages))],
            splits={},
            fingerprint="",
        )
        queries, rows_P, row_1 = encode_texts([query]), np.arange(len(passages)), np.arange(1)
        forward = self.run.forward
        query_1xD = encode.queries(forward, self.retriever["query"], queries, row_1)
        passages_PxD = encode.passages(forward, self.retriever["passage"], store, rows_P)
        reranker_1xP = rerank.scores(forward, self.reranker, store, queries, row_1, rows_P[None])
        return passages_PxD @ query_1xD[0], reranker_1xP[0]


def open_scorer(workdir: str, state: str) -> Scorer:
    """The models of a workdir in a state: "reranker" (both warmed up) or "joint".

    Raises:
      InputError: no workdir, or the state has not been reached.
    """
    run = open_workdir(pathlib.Path(workdir))
    return Scorer(run, run.params(state, "retriever"), run.params(state, "reranker"))
