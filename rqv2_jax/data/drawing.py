"""Lists drawn from candidates: hybrid data augmentation (paper, section 3.3).

*Undenoised* lists hold the labelled positive and negatives drawn from the retrieved candidates.
*Denoised* lists take as negatives only candidates that the warmed-up re-ranker is confident are not
relevant, and those it is confident are relevant head lists of their own. Known positives are never
negatives. Memory beside the candidates is that of the lists, and of what `AT_ONCE` queries need.

Shape suffixes: Q queries, N candidates of a query (or labelled pairs), L lists, P passages of a list, K
negatives of a list, H labelled heads, S those of queries with scores, or lists to fill, F heads found
relevant.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from rqv2_jax.data import calibration
from rqv2_jax.data.lists import Candidates, Lists, Provenance, known_positive, parts, same_text
from rqv2_jax.errors import InputError


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
    judge = functools.partial(_judge, candidates, never_negative_2xN, denoising, num_passages)
    query_L, head_L, kind_L, denoised_L = _choose_heads(
        candidates, positives_2xN, *_found_relevant(candidates, denoising, judge), denoising, rng
    )
    passages_LxP = np.empty((len(query_L), list_size), np.int32)
    passages_LxP[:, 0] = head_L
    # One part after the other, and before all fills, as they share a sequence of random numbers.
    for part in parts(len(query_L)):
        judged, denoised_Lx1 = judge(query_L[part]), denoised_L[part, None]
        eligible_LxN = np.where(denoised_Lx1, judged.trusted_QxN, judged.undenoised_QxN)
        negatives_LxK = _choose_negatives(judged.passages_QxN, eligible_LxN, list_size - 1, rng)
        passages_LxP[part, 1:] = negatives_LxK
    kinds = [Provenance.UNDENOISED_NEGATIVE, Provenance.DENOISED_NEGATIVE]
    provenance_L = np.array(kinds, np.uint8)[denoised_L.astype(int)]
    provenance_LxP = provenance_L[:, None].repeat(list_size, axis=1)
    provenance_LxP[:, 0] = kind_L
    provenance_LxP[passages_LxP < 0] = Provenance.RANDOM_FILL
    lists = Lists(candidates.query_rows_Q[query_L], passages_LxP, provenance_LxP)

    def barred(numbers_S: np.ndarray) -> np.ndarray:
        # A candidate that is rejected must not come back by chance.
        judged, denoised_Sx1 = judge(query_L[numbers_S]), denoised_L[numbers_S, None]
        barred_SxN = np.where(denoised_Sx1, judged.rejected_QxN, judged.barred_QxN)
        return np.where(barred_SxN, judged.passages_QxN, -1)

    _fill(lists, barred, never_negative_2xN, num_passages, rng)
    return lists.take(rng.permutation(len(query_L)))


@dataclasses.dataclass(frozen=True)
class _Judged:
    """What candidates of some queries may be: passages [Q, N], and whether each of them is that.

    Negatives of a denoised list are trusted, those of another one undenoised. Rejected ones do not fill
    a denoised list, barred ones no other. Those found relevant are not labelled.
    """

    passages_QxN: np.ndarray
    trusted_QxN: np.ndarray
    undenoised_QxN: np.ndarray
    rejected_QxN: np.ndarray
    barred_QxN: np.ndarray
    relevant_QxN: np.ndarray


def _judge(
    candidates: Candidates,
    never_negative_2xN: np.ndarray,
    denoising: Denoising,
    num_passages: int,
    numbers_Q: slice | np.ndarray,
) -> _Judged:
    """Returns what the candidates of the queries with these numbers may be."""
    some = candidates.take(numbers_Q)
    rows_Q, passages_QxN, scores_QxN = some.query_rows_Q, some.passages_QxN, some.reranker_QxN
    known_QxN = known_positive(never_negative_2xN, rows_Q, passages_QxN, num_passages)
    known_QxN |= passages_QxN < 0
    near_QxN = some.too_near()
    trusted_QxN = relevant_QxN = np.zeros_like(known_QxN)
    if denoising.share > 0:
        # NaN where there is no score, which is on neither side of a threshold.
        p_QxN = calibration.relevance(scores_QxN, denoising.probability)
        trusted_QxN = ~known_QxN & (p_QxN < denoising.negative_below)
        relevant_QxN = ~known_QxN & (p_QxN > denoising.positive_above)
    return _Judged(
        passages_QxN,
        trusted_QxN,
        undenoised_QxN=~(known_QxN | near_QxN),
        rejected_QxN=~np.isnan(scores_QxN) & ~trusted_QxN,
        barred_QxN=relevant_QxN | near_QxN,
        relevant_QxN=relevant_QxN,
    )


def _found_relevant(
    candidates: Candidates, denoising: Denoising, judge: Callable[[slice], _Judged]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which queries have scores [Q], and the candidates found relevant [2, F].

    These as the query's number among the candidates', and the passage.
    """
    scored_Q = np.zeros(len(candidates.query_rows_Q), bool)
    if denoising.share == 0:
        return scored_Q, np.zeros((2, 0), np.int64)
    below, above = denoising.negative_below, denoising.positive_above
    if below > above:
        raise InputError(
            f"config.mine.negative_below ({below}) is above positive_above "
            f"({above}), so a passage could be both; lower it"
        )
    found = [np.zeros((2, 0), np.int64)]
    for part in parts(len(scored_Q)):
        scored_Q[part] = ~np.isnan(candidates.reranker_QxN[part]).all(axis=1)
        judged = judge(part)
        query_F, place_F = np.nonzero(judged.relevant_QxN)
        found.append(np.stack([part.start + query_F, judged.passages_QxN[query_F, place_F]]))
    if not scored_Q.any():
        raise InputError(
            "config.joint.denoised_share is above 0, but the candidates have no re-ranker "
            "scores; run the mine stage first"
        )
    return scored_Q, np.concatenate(found, axis=1)


def _choose_heads(
    candidates: Candidates,
    positives_2xN: np.ndarray,
    scored_Q: np.ndarray,
    relevant_2xF: np.ndarray,
    denoising: Denoising,
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
    order_H = rng.permutation(labelled_2xH.shape[1])
    scored_S = order_H[scored_Q[labelled_2xH[0, order_H]]]
    denoised_H = np.zeros(len(order_H), bool)
    denoised_H[scored_S[: round(denoising.share * len(scored_S))]] = True
    count = relevant_2xF.shape[1]
    relevant_2xF = relevant_2xF[:, rng.permutation(count)[: round(denoising.share * count)]]
    kinds = [Provenance.LABELLED_POSITIVE, Provenance.DENOISED_POSITIVE]
    return (
        np.concatenate([labelled_2xH[0], relevant_2xF[0]]),
        np.concatenate([labelled_2xH[1], relevant_2xF[1]]),
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
    rng = np.random.default_rng(seed)
    _fill(filled, lambda rows_S: np.empty((len(rows_S), 0)), heads_2xL, num_passages, rng)
    return filled


def _fill(
    lists: Lists,
    barred: Callable[[np.ndarray], np.ndarray],
    positives_2xN: np.ndarray,
    num_passages: int,
    rng: np.random.Generator,
) -> None:
    """Replaces every -1 by a random passage neither in the list nor barred nor labelled relevant.

    `barred(numbers_S)` gives the barred passages [S, N] of the lists with these numbers.
    """
    passages_LxP, query_rows_L = lists.passages_LxP, lists.query_rows_L
    short = np.nonzero((passages_LxP < 0).any(axis=1))[0]
    order = np.argsort(positives_2xN[0], kind="stable")
    sorted_queries = positives_2xN[0][order]
    barred_rows = (
        pair for part in parts(len(short)) for pair in zip(short[part], barred(short[part]))
    )
    for row, barred_N in barred_rows:
        first, last = np.searchsorted(sorted_queries, [query_rows_L[row], query_rows_L[row] + 1])
        excluded = {
            *passages_LxP[row].tolist(),
            *barred_N.tolist(),
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
