"""Candidates and the lists drawn from them: hybrid data augmentation (paper, section 3.3).

*Undenoised* lists hold the labelled positive and negatives drawn from the retrieved candidates.
*Denoised* lists take as negatives only candidates that the warmed-up re-ranker is confident are not
relevant, and those it is confident are relevant head lists of their own. Known positives are never
negatives.

Shape suffixes: Q queries, N candidates of a query (or labelled pairs), L lists, P passages of a list, K
negatives of a list, H labelled heads, S those of queries with scores, F heads found relevant.
"""

import dataclasses
import enum

import ml_collections
import numpy as np

from rqv2_jax.data import calibration
from rqv2_jax.errors import InputError


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

    def centred(self, depth: int) -> "Candidates":
        """Returns re-ranker scores less the mean of those that a query's first `depth` candidates have.

        A query without any keeps NaN.
        """
        first_QxN = self.reranker_QxN[:, :depth]
        scored_QxN = ~np.isnan(first_QxN)
        count_Qx1 = scored_QxN.sum(axis=1, keepdims=True)
        total_Qx1 = np.where(scored_QxN, first_QxN, 0).sum(axis=1, keepdims=True)
        mean_Qx1 = total_Qx1 / np.where(count_Qx1, count_Qx1, np.nan)
        reranker_QxN = (self.reranker_QxN - mean_Qx1).astype(np.float32)
        return dataclasses.replace(self, reranker_QxN=reranker_QxN)

    def too_near(self) -> np.ndarray:
        """Returns which candidates the retriever scores above `highest_Q` [Q, N]."""
        if self.highest_Q is None:
            return np.zeros(self.passages_QxN.shape, bool)
        return self.retriever_QxN > self.highest_Q[:, None]


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
    """Lists of one positive, first, and P-1 negatives: row numbers, and each one's `Provenance`."""

    query_rows_L: np.ndarray
    passages_LxP: np.ndarray
    provenance_LxP: np.ndarray
    teacher_LxP: np.ndarray | None = None  # another ranker's scores, NaN where it has none

    def positive(self) -> np.ndarray:
        """Returns which passage of each list is its positive [L, P]."""
        return self.provenance_LxP <= Provenance.DENOISED_POSITIVE

    def take(self, numbers_L: np.ndarray) -> "Lists":
        """Returns the lists with these numbers, in this order."""
        return Lists(**{name: x[numbers_L] for name, x in vars(self).items() if x is not None})


@dataclasses.dataclass(frozen=True)
class Denoising:
    """The share of lists to denoise, and thresholds on the probability of relevance.

    `probability` is slope and offset of `calibration.calibrate`; it and the thresholds are not used if
    the share is 0.
    """

    share: float
    probability: tuple[float, float]
    negative_below: float
    positive_above: float


def known_positive(
    pairs_2xN: np.ndarray, query_rows_Q: np.ndarray, passages_QxN: np.ndarray, num_passages: int
) -> np.ndarray:
    """Returns which candidates are labelled relevant for their query [Q, N]."""
    labelled = np.unique(pairs_2xN[0] * num_passages + pairs_2xN[1])
    codes_QxN = query_rows_Q[:, None] * num_passages + passages_QxN
    return np.isin(codes_QxN, labelled) & (passages_QxN >= 0)


def draw(
    candidates: Candidates,
    positives_2xN: np.ndarray,
    own_2xN: np.ndarray,
    *,
    list_size: int,
    denoising: Denoising,
    num_passages: int,
    seed: int,
    epoch: int,
) -> Lists:
    """Draws one epoch of lists, in random order: a pure function of its arguments.

    Every labelled positive of the candidates' queries heads one list. A share of the lists of queries
    with re-ranker scores is denoised; in the same proportion, the denoised positives head further
    lists, denoised too. Where fewer than `list_size - 1` candidates qualify, random passages fill the
    list (`RANDOM_FILL`). Raises InputError if lists are to be denoised and no candidate has a score.

    Args:
      positives_2xN: the labelled pairs of the split: query row, passage row.
      own_2xN: further pairs that are no negatives either: passages that are the query itself, or have
        the text of a positive.
      num_passages: of the whole collection, to draw fills from.
    """
    rng = np.random.default_rng([seed, epoch])
    never_negative_2xN = np.concatenate([positives_2xN, own_2xN], axis=1)
    known_QxN = known_positive(
        never_negative_2xN, candidates.query_rows_Q, candidates.passages_QxN, num_passages
    )
    known_QxN |= candidates.passages_QxN < 0
    near_QxN = candidates.too_near()
    trusted_QxN, relevant_QxN = _judged(candidates, known_QxN, denoising)
    query_L, head_L, kind_L, denoised_L = _choose_heads(
        candidates, positives_2xN, relevant_QxN, denoising.share, rng
    )
    denoised_Lx1, passages_LxN = denoised_L[:, None], candidates.passages_QxN[query_L]
    eligible_LxN = np.where(denoised_Lx1, trusted_QxN[query_L], ~(known_QxN | near_QxN)[query_L])
    negatives_LxK = _choose_negatives(passages_LxN, eligible_LxN, list_size - 1, rng)
    passages_LxP = np.concatenate([head_L[:, None], negatives_LxK], axis=1)
    provenance_LxP = np.where(
        denoised_Lx1, Provenance.DENOISED_NEGATIVE, Provenance.UNDENOISED_NEGATIVE
    ).repeat(list_size, axis=1)
    provenance_LxP[:, 0] = kind_L
    provenance_LxP[passages_LxP < 0] = Provenance.RANDOM_FILL
    lists = Lists(candidates.query_rows_Q[query_L], passages_LxP, provenance_LxP.astype(np.uint8))
    # A candidate that is rejected must not come back by chance.
    rejected_QxN = ~np.isnan(candidates.reranker_QxN) & ~trusted_QxN
    barred_LxN = np.where(denoised_Lx1, rejected_QxN[query_L], (relevant_QxN | near_QxN)[query_L])
    barred_LxN = np.where(barred_LxN, passages_LxN, -1)
    _fill(lists, barred_LxN, never_negative_2xN, num_passages, rng)
    return lists.take(rng.permutation(len(query_L)))


def _judged(
    candidates: Candidates, known_QxN: np.ndarray, denoising: Denoising
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which unlabelled candidates are trusted as negatives, and which are found relevant."""
    if denoising.share == 0:
        return np.zeros_like(known_QxN), np.zeros_like(known_QxN)
    if np.isnan(candidates.reranker_QxN).all():
        raise InputError(
            "config.joint.denoised_share is above 0, but the candidates have no re-ranker "
            "scores; run the mine stage first"
        )
    below, above = denoising.negative_below, denoising.positive_above
    if below > above:
        raise InputError(
            f"config.mine.negative_below ({below}) is above positive_above "
            f"({above}), so a passage could be both; lower it"
        )
    # NaN where there is no score, which is on neither side of a threshold.
    p_QxN = calibration.relevance(candidates.reranker_QxN, denoising.probability)
    return ~known_QxN & (p_QxN < below), ~known_QxN & (p_QxN > above)


def _choose_heads(
    candidates: Candidates,
    positives_2xN: np.ndarray,
    relevant_QxN: np.ndarray,
    share: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns all labelled positives and a share of the candidates found relevant, each [L].

    As the number of the query among the candidates', the passage, its provenance, and whether the list
    is denoised.
    """
    number_of = {row: i for i, row in enumerate(candidates.query_rows_Q.tolist())}
    labelled = [
        (number_of[query], passage)
        for query, passage in positives_2xN.T.tolist()
        if query in number_of
    ]
    labelled_2xH = np.array(labelled, np.int64).reshape(-1, 2).T
    scored_Q = ~np.isnan(candidates.reranker_QxN).all(axis=1)
    order_H = rng.permutation(labelled_2xH.shape[1])
    scored_S = order_H[scored_Q[labelled_2xH[0, order_H]]]
    denoised_H = np.zeros(len(order_H), bool)
    denoised_H[scored_S[: round(share * len(scored_S))]] = True
    relevant_2xF = np.array(np.nonzero(relevant_QxN))
    count = relevant_2xF.shape[1]
    relevant_2xF = relevant_2xF[:, rng.permutation(count)[: round(share * count)]]
    kinds = [Provenance.LABELLED_POSITIVE, Provenance.DENOISED_POSITIVE]
    return (
        np.concatenate([labelled_2xH[0], relevant_2xF[0]]),
        np.concatenate([labelled_2xH[1], candidates.passages_QxN[tuple(relevant_2xF)]]),
        np.repeat(kinds, [len(order_H), relevant_2xF.shape[1]]),
        np.concatenate([denoised_H, np.ones(relevant_2xF.shape[1], bool)]),
    )


def _choose_negatives(
    passages_LxN: np.ndarray, eligible_LxN: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws `count` of the eligible passages of each list [L, K], -1 where there are too few."""
    keys_LxN = np.where(eligible_LxN, rng.random(eligible_LxN.shape), np.inf)
    chosen_LxK = np.argsort(keys_LxN, axis=1)[:, :count]
    usable_LxK = np.take_along_axis(eligible_LxN, chosen_LxK, axis=1)
    negatives_LxK = np.where(usable_LxK, np.take_along_axis(passages_LxN, chosen_LxK, axis=1), -1)
    missing = count - negatives_LxK.shape[1]
    return np.pad(negatives_LxK, ((0, 0), (0, missing)), constant_values=-1)


def same_text(
    pairs_2xN: np.ndarray, query_rows_Q: np.ndarray, passages_QxN: np.ndarray, text_N: np.ndarray
) -> np.ndarray:
    """Returns the candidates that have the text of one labelled for their query: pairs [2, N].

    Those labelled themselves are not among them. `text_N` is `Store.same_text` of all these passages.
    """
    texts_2xN = np.stack([pairs_2xN[0], text_N[pairs_2xN[1]]])
    same_QxN = known_positive(texts_2xN, query_rows_Q, text_N[passages_QxN], len(text_N))
    same_QxN &= ~known_positive(pairs_2xN, query_rows_Q, passages_QxN, len(text_N))
    query_N, place_N = np.nonzero(same_QxN)
    return np.stack([query_rows_Q[query_N], passages_QxN[query_N, place_N]])


def without_known_positives(lists: Lists, text_N: np.ndarray, *, seed: int) -> Lists:
    """Replaces negatives that head another list of the same query by random passages (`RANDOM_FILL`).

    So it does with those that have the text of a head. `text_N` is `Store.same_text` of all passages.
    Raises InputError if the collection has too few for that.
    """
    heads_2xL = np.stack([lists.query_rows_L, lists.passages_LxP[:, 0]])
    twins_2xN = same_text(heads_2xL, lists.query_rows_L, lists.passages_LxP, text_N)
    heads_2xL, num_passages = np.concatenate([heads_2xL, twins_2xN], axis=1), len(text_N) - 1
    known_LxP = known_positive(heads_2xL, lists.query_rows_L, lists.passages_LxP, num_passages)
    known_LxP[:, 0] = False
    filled = dataclasses.replace(
        lists,
        passages_LxP=np.where(known_LxP, -1, lists.passages_LxP),
        provenance_LxP=np.where(known_LxP, np.uint8(Provenance.RANDOM_FILL), lists.provenance_LxP),
    )
    barred_LxN, rng = np.empty((len(known_LxP), 0), np.int64), np.random.default_rng(seed)
    _fill(filled, barred_LxN, heads_2xL, num_passages, rng)
    return filled


def training_lists(stage: ml_collections.ConfigDict, count: int) -> int:
    """Returns how many lists a training stage takes by its settings, where one pass has `count`."""
    return min(round(stage.epochs * count), stage.most_lists)


def subset(count: int, most: int, seed: int) -> np.ndarray:
    """Draws at most `most` of the numbers below `count` at random, in random order."""
    return np.random.default_rng(seed).permutation(count)[:most]


def _fill(
    lists: Lists,
    barred_LxN: np.ndarray,
    positives_2xN: np.ndarray,
    num_passages: int,
    rng: np.random.Generator,
) -> None:
    """Replaces every -1 by a random passage neither in the list nor barred nor labelled relevant."""
    passages_LxP, query_rows_L = lists.passages_LxP, lists.query_rows_L
    short = np.nonzero((passages_LxP < 0).any(axis=1))[0]
    order = np.argsort(positives_2xN[0], kind="stable")
    sorted_queries = positives_2xN[0][order]
    for row in short:
        first, last = np.searchsorted(sorted_queries, [query_rows_L[row], query_rows_L[row] + 1])
        excluded = {
            *passages_LxP[row].tolist(),
            *barred_LxN[row].tolist(),
            *positives_2xN[1][order[first:last]].tolist(),
        }
        if num_passages - len(excluded - {-1}) < (passages_LxP[row] < 0).sum():
            raise InputError(
                f"a list of {passages_LxP.shape[1]} passages cannot be filled from a collection of "
                f"{num_passages}; lower the list_size in the config"
            )
        for column in np.nonzero(passages_LxP[row] < 0)[0]:
            while (passage := int(rng.integers(num_passages))) in excluded:
                pass
            excluded.add(passage)
            passages_LxP[row, column] = passage
