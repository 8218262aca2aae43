"""Queries that are passages of the corpus too, with the same id, as in ArguAna and Quora.

Such a passage is the query's own text: retrieved first, it is neither a negative nor a hit. As in
BEIR, `config.data.ignore_identical_ids` ignores it: always, never, or automatically if most passages
with a query's id have the query's text, as numbers may be ids of both by chance. A passage that is
labelled relevant for the query is not ignored.

Shape suffixes: Q queries, K passages of a query, best first, N pairs of query and passage, or queries.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from rqv2_jax.data.tokens import Queries, Store

# Pairs with one id that are compared, and the share of them that must have the same text.
LOOKED_AT, MOST = 1000, 0.5


def marked(store: Store, mode: str) -> Store:
    """Returns the store with `own_2xN` in all its splits; `mode` is "auto", "always" or "never"."""
    splits = {name: of_queries(store, queries, mode) for name, queries in store.splits.items()}
    return dataclasses.replace(store, splits=splits)


def of_queries(store: Store, queries: Queries, mode: str) -> Queries:
    """Returns the queries, with those passages of the store that are their own text as `own_2xN`."""
    if mode == "never":
        return queries
    own_2xN = queries.same_2xN
    if own_2xN is None:
        query_rows = {key: row for row, key in enumerate(queries.ids)}
        own_2xN = same_ids(query_rows, enumerate(store.passage_ids))
    if mode == "auto" and not _one_text(store, queries, own_2xN):
        return queries
    code, positive = (
        each[0] * len(store.texts) + each[1] for each in (own_2xN, queries.positives())
    )
    return dataclasses.replace(queries, own_2xN=own_2xN[:, ~np.isin(code, positive)])


def same_ids(query_rows: dict[str, int], passages: Iterable[tuple[int, str]]) -> np.ndarray:
    """Returns the rows of queries and passages with one id [2, N], sorted; passages as (row, id)."""
    pairs = [(query_rows[key], row) for row, key in passages if key in query_rows]
    return np.array(sorted(pairs), np.int64).reshape(-1, 2).T


def _one_text(store: Store, queries: Queries, own_2xN: np.ndarray) -> bool:
    """Says whether most queries have the text of the passage with their id."""
    count = own_2xN.shape[1]
    chosen = np.arange(min(count, LOOKED_AT)) * count // max(min(count, LOOKED_AT), 1)
    same = 0
    for query, passage in own_2xN[:, chosen].T.tolist():
        asked, text = queries.texts.row(query), store.texts.row(passage)
        with_title = np.concatenate([store.titles.row(passage), text])
        same += np.array_equal(asked, text) or np.array_equal(asked, with_title)
    return count > 0 and same >= MOST * len(chosen)


def remarks(store: Store) -> list[str]:
    """Returns a line for each split in which passages are ignored."""
    return [
        f"{queries.own_2xN.shape[1]:,} of {len(queries.ids):,} {split} queries stand in the corpus "
        "under their own id; such passages are ignored for their query "
        "(config.data.ignore_identical_ids)"
        for split, queries in store.splits.items()
        if queries.own_2xN.size
    ]


def of_rows(queries: Queries, rows_Q: np.ndarray) -> np.ndarray:
    """Returns the passage to ignore for each of some queries [Q], -1 where there is none."""
    own_N = np.full(len(queries.ids), -1)
    own_N[queries.own_2xN[0]] = queries.own_2xN[1]
    return own_N[rows_Q]


def deeper(depth: int, own_Q: np.ndarray) -> int:
    """Returns how many passages to retrieve, so that `without` leaves `depth`."""
    return depth + int((own_Q >= 0).any())


def without(
    passages_QxK: np.ndarray, scores_QxK: np.ndarray, own_Q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Removes the ignored passages and their scores; if there are any, one column for all queries."""
    if not (own_Q >= 0).any():
        return passages_QxK, scores_QxK
    dropped_QxK = (passages_QxK == own_Q[:, None]) & (own_Q >= 0)[:, None]
    dropped_QxK[~dropped_QxK.any(axis=1), -1] = True
    shape = len(passages_QxK), passages_QxK.shape[1] - 1
    return passages_QxK[~dropped_QxK].reshape(shape), scores_QxK[~dropped_QxK].reshape(shape)
