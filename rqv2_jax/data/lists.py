"""Candidates of queries, and lists of passages to train on. `drawing` draws these from those.

Shape suffixes: Q queries, N candidates of a query (or labelled pairs), L lists, P passages of a list.
"""

import dataclasses
import enum
from collections.abc import Iterator

import ml_collections
import numpy as np

# Queries or lists whose candidates are looked at at once, so that memory does not grow with all.
AT_ONCE = 1024


class Provenance(enum.IntEnum):
    """Where a passage of a list comes from."""

    LABELLED_POSITIVE = 0
    DENOISED_POSITIVE = 1
    UNDENOISED_NEGATIVE = 2
    DENOISED_NEGATIVE = 3
    RANDOM_FILL = 4
    GIVEN_NEGATIVE = 5  # of lists that come in a file


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Passages that were found for each query, best first.

    `query_rows_Q` and `passages_QxN` are row numbers, passage -1 where fewer were found.
    `retriever_QxN` and `reranker_QxN` are scores in float32, NaN where the retriever has not found a
    passage or the re-ranker not seen it. Passages that the retriever scores above `highest_Q` are too
    near the labelled ones to be undenoised negatives; None if there is no such limit.
    """

    query_rows_Q: np.ndarray
    passages_QxN: np.ndarray
    retriever_QxN: np.ndarray
    reranker_QxN: np.ndarray
    highest_Q: np.ndarray | None = None

    def first(self, queries: int, depth: int) -> "Candidates":
        """Returns the first `depth` candidates of the first `queries` queries."""
        tables = self.passages_QxN, self.retriever_QxN, self.reranker_QxN
        highest_Q = None if self.highest_Q is None else self.highest_Q[:queries]
        passages, retriever, reranker = (x[:queries, :depth] for x in tables)
        rows_Q = self.query_rows_Q[:queries]
        return Candidates(rows_Q, passages, retriever, reranker, highest_Q)

    def take(self, numbers_Q: slice | np.ndarray) -> "Candidates":
        """Returns the candidates of the queries with these numbers, in this order."""
        return Candidates(**{name: x[numbers_Q] for name, x in vars(self).items() if x is not None})

    def centred(self, depth: int) -> "Candidates":
        """Returns re-ranker scores less the mean of those that a query's first `depth` candidates have.

        A query without any keeps NaN.
        """
        reranker_QxN = np.empty(self.reranker_QxN.shape, np.float32)
        for part in parts(len(reranker_QxN)):
            first_QxN = self.reranker_QxN[part, :depth]
            scored_QxN = ~np.isnan(first_QxN)
            count_Qx1 = scored_QxN.sum(axis=1, keepdims=True)
            total_Qx1 = np.where(scored_QxN, first_QxN, 0).sum(axis=1, keepdims=True)
            mean_Qx1 = total_Qx1 / np.where(count_Qx1, count_Qx1, np.nan)
            reranker_QxN[part] = self.reranker_QxN[part] - mean_Qx1
        return dataclasses.replace(self, reranker_QxN=reranker_QxN)

    def too_near(self) -> np.ndarray:
        """Returns which candidates the retriever scores above `highest_Q` [Q, N]."""
        if self.highest_Q is None:
            return np.zeros(self.passages_QxN.shape, bool)
        return self.retriever_QxN > self.highest_Q[:, None]


def parts(count: int) -> Iterator[slice]:
    """Yields slices that make up `count` queries or lists, in order."""
    return (slice(start, min(start + AT_ONCE, count)) for start in range(0, count, AT_ONCE))


def interleaved(
    rankings: list[tuple[np.ndarray, np.ndarray]], depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Takes passages [Q, N] of rankings in turn, each once, and returns the first `depth` and scores.

    Passage -1 is padding, and where a query has fewer. A score is that of any ranking in which it is
    not NaN.
    """
    width = max(passages_QxN.shape[1] for passages_QxN, _ in rankings)
    passages_QxM, scores_QxM = (
        np.stack(
            [np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=fill) for x in of], 2
        )
        for of, fill in zip(zip(*rankings), (-1, np.nan))
    )
    passages_QxM, scores_QxM = (x.reshape(len(x), -1) for x in (passages_QxM, scores_QxM))
    order_QxM = np.argsort(passages_QxM, axis=1, kind="stable")
    sorted_QxM, score_QxM = (
        np.take_along_axis(x, order_QxM, axis=1) for x in (passages_QxM, scores_QxM)
    )
    again_QxM = sorted_QxM[:, 1:] == sorted_QxM[:, :-1]
    # At most two rankings have a passage, so that its entries are neighbours.
    score_QxM[:, :-1] = np.where(
        again_QxM, np.fmax(score_QxM[:, :-1], score_QxM[:, 1:]), score_QxM[:, :-1]
    )
    np.put_along_axis(scores_QxM, order_QxM, score_QxM, axis=1)
    dropped_QxM = passages_QxM < 0
    np.put_along_axis(dropped_QxM, order_QxM[:, 1:], again_QxM | (sorted_QxM[:, 1:] < 0), axis=1)
    first_QxN = np.argsort(dropped_QxM, axis=1, kind="stable")[:, :depth]
    dropped_QxN, passages_QxN, scores_QxN = (
        np.take_along_axis(x, first_QxN, axis=1) for x in (dropped_QxM, passages_QxM, scores_QxM)
    )
    return np.where(dropped_QxN, -1, passages_QxN), np.where(dropped_QxN, np.nan, scores_QxN)


@dataclasses.dataclass(frozen=True)
class Lists:
    """Lists of one positive, first, and P-1 negatives: row numbers, and each one's `Provenance`.

    `draw` gives passages as int32 and provenance as uint8.
    """

    query_rows_L: np.ndarray
    passages_LxP: np.ndarray
    provenance_LxP: np.ndarray
    teacher_LxP: np.ndarray | None = None  # another ranker's scores, NaN where it has none

    def positive(self) -> np.ndarray:
        """Returns which passage of each list is its positive [L, P]."""
        return self.provenance_LxP <= Provenance.DENOISED_POSITIVE

    def identity(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of queries and passages as int64, by whose bytes lists are compared."""
        return self.query_rows_L, self.passages_LxP.astype(np.int64, copy=False)

    def take(self, numbers_L: np.ndarray) -> "Lists":
        """Returns the lists with these numbers, in this order."""
        return Lists(**{name: x[numbers_L] for name, x in vars(self).items() if x is not None})


def known_positive(
    pairs_2xN: np.ndarray, query_rows_Q: np.ndarray, passages_QxN: np.ndarray, num_passages: int
) -> np.ndarray:
    """Returns which candidates are labelled relevant for their query [Q, N]."""
    pairs_2xN = pairs_2xN[:, np.isin(pairs_2xN[0], query_rows_Q)]
    labelled = np.unique(pairs_2xN[0] * num_passages + pairs_2xN[1])
    known_QxN = np.zeros(passages_QxN.shape, bool)
    if not len(labelled):
        return known_QxN
    for part in parts(len(known_QxN)):
        codes_QxN = query_rows_Q[part, None] * num_passages + passages_QxN[part]
        next_QxN = np.searchsorted(labelled, codes_QxN).clip(max=len(labelled) - 1)
        known_QxN[part] = (labelled[next_QxN] == codes_QxN) & (passages_QxN[part] >= 0)
    return known_QxN


def same_text(
    pairs_2xN: np.ndarray, query_rows_Q: np.ndarray, passages_QxN: np.ndarray, text_N: np.ndarray
) -> np.ndarray:
    """Returns the candidates that have the text of one labelled for their query: pairs [2, N].

    Those labelled themselves are not among them. `text_N` is `Store.same_text` of all these passages.
    """
    texts_2xN = np.stack([pairs_2xN[0], text_N[pairs_2xN[1]]])
    found = [np.zeros((2, 0), np.int64)]
    for part in parts(len(query_rows_Q)):
        rows_Q, part_QxN = query_rows_Q[part], passages_QxN[part]
        same_QxN = known_positive(texts_2xN, rows_Q, text_N[part_QxN], len(text_N))
        same_QxN &= ~known_positive(pairs_2xN, rows_Q, part_QxN, len(text_N))
        query_N, place_N = np.nonzero(same_QxN)
        found.append(np.stack([rows_Q[query_N], part_QxN[query_N, place_N]]))
    return np.concatenate(found, axis=1)


def training_lists(stage: ml_collections.ConfigDict, count: int) -> int:
    """Returns how many lists a training stage takes by its settings, where one pass has `count`."""
    return min(round(stage.epochs * count), stage.most_lists)


def subset(count: int, most: int, seed: int) -> np.ndarray:
    """Draws at most `most` of the numbers below `count` at random, in random order."""
    return np.random.default_rng(seed).permutation(count)[:most]
