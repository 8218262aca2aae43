"""Candidates and the lists drawn from them: hybrid data augmentation (paper, section 3.3).

*Undenoised* lists hold the labelled positive and negatives drawn from the retrieved candidates.
*Denoised* lists take as negatives only candidates that the warmed-up re-ranker is confident are not
relevant, and those it is confident are relevant head lists of their own. Known positives are never
negatives. Shape suffixes: Q queries, N candidates of a query, L lists, P passages of a list.
"""

import dataclasses
import enum

import numpy as np

from rqv2_jax.errors import InputError

# Of scored candidates, in the population that probabilities of relevance speak of.
RELEVANT_SHARE = 0.2


class Provenance(enum.IntEnum):
    """Where a passage of a list comes from."""

    LABELLED_POSITIVE = 0
    DENOISED_POSITIVE = 1
    UNDENOISED_NEGATIVE = 2
    DENOISED_NEGATIVE = 3
    RANDOM_FILL = 4
    GIVEN_NEGATIVE = 5  # of a list that came in a file


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What the retriever found for each query, best first.

    `query_rows_Q` and `passages_QxN` are row numbers, `retriever_QxN` and `reranker_QxN` scores in
    float32 (the latter NaN where the re-ranker has not seen them).
    """

    query_rows_Q: np.ndarray
    passages_QxN: np.ndarray
    retriever_QxN: np.ndarray
    reranker_QxN: np.ndarray

    def first(self, queries: int, depth: int) -> "Candidates":
        """The first `depth` candidates of the first `queries` queries."""
        return Candidates(
            self.query_rows_Q[:queries],
            self.passages_QxN[:queries, :depth],
            self.retriever_QxN[:queries, :depth],
            self.reranker_QxN[:queries, :depth],
        )


@dataclasses.dataclass(frozen=True)
class Lists:
    """Lists of one positive and P-1 negatives, the positive first.

    `query_rows_L`, `passages_LxP` row numbers; `provenance_LxP` of `Provenance`.
    """

    query_rows_L: np.ndarray
    passages_LxP: np.ndarray
    provenance_LxP: np.ndarray

    def positive(self) -> np.ndarray:
        """Which passage of each list is its positive [L, P]."""
        return self.provenance_LxP <= Provenance.DENOISED_POSITIVE

    def take(self, numbers_L: np.ndarray) -> "Lists":
        """Some of the lists, in the order of their numbers."""
        return Lists(*(x[numbers_L] for x in vars(self).values()))


def known_positive(pairs_2xN: np.ndarray, query_rows_Q, passages_QxN, num_passages: int):
    """Which candidates are labelled relevant for their query, [Q, N]."""
    labelled = np.unique(pairs_2xN[0] * num_passages + pairs_2xN[1])
    return np.isin(query_rows_Q[:, None] * num_passages + passages_QxN, labelled)


def fit_probability(scores_N: np.ndarray, relevant_N: np.ndarray) -> tuple[float, float]:
    """Platt scaling: slope and offset of P(relevant) = sigmoid(slope * score + offset).

    Newton's method on the log-likelihood of dev candidates, with Platt's smoothed targets
    (Platt 1999), which keep it finite where the two classes do not overlap.
    """
    positives, negatives = relevant_N.sum(), (~relevant_N).sum()
    target_N = np.where(relevant_N, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    scores_N = scores_N.astype(np.float64)
    centre, scale = scores_N.mean(), max(scores_N.std(), 1e-6)
    x_Nx2 = np.stack([(scores_N - centre) / scale, np.ones_like(scores_N)], axis=1)

    def loss(w):
        logit_N = x_Nx2 @ w
        return np.sum(np.logaddexp(0, logit_N) - target_N * logit_N)

    w = np.array([0.0, np.log((positives + 1) / (negatives + 1))])
    for _ in range(50):
        p_N = _sigmoid(x_Nx2 @ w)
        hessian = (x_Nx2 * (p_N * (1 - p_N))[:, None]).T @ x_Nx2 + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, x_Nx2.T @ (target_N - p_N))
        # A whole step overshoots, and then diverges, where the classes hardly overlap.
        while loss(w + step) > loss(w):
            step = step / 2
        w = w + step
    slope = w[0] / scale
    return float(slope), float(w[1] - slope * centre)


def calibrate(scores_N: np.ndarray, relevant_N: np.ndarray) -> tuple[float, float]:
    """Slope and offset of P(relevant) for `relevance`, as if `RELEVANT_SHARE` were relevant.

    `fit_probability`, its odds multiplied by those of that share over those of the dev candidates',
    which depends on how deep they reach: without this no score at depth 50, where one of 50 has a
    label, would make a passage relevant. A re-ranker that scores relevant ones no higher gets slope 0,
    so that no passage is told from another.
    """
    slope, offset = fit_probability(scores_N, relevant_N)
    positives, total = relevant_N.sum() + 1, len(relevant_N) + 2
    here = np.log(positives / (total - positives))
    if not slope > 0:
        slope, offset = 0.0, here
    # The odds of one population to those of the other.
    return slope, float(offset - here + np.log(RELEVANT_SHARE / (1 - RELEVANT_SHARE)))


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def relevance(scores, probability: tuple[float, float]) -> np.ndarray:
    """P(relevant) of re-ranker scores by slope and offset of `calibrate`; NaN stays NaN."""
    slope, offset = probability
    return _sigmoid(slope * scores + offset)


def draw(
    candidates: Candidates,
    positives_2xN: np.ndarray,
    *,
    own_2xN: np.ndarray,
    list_size: int,
    denoised_share: float,
    probability: tuple[float, float],
    negative_below: float,
    positive_above: float,
    num_passages: int,
    seed: int,
    epoch: int,
) -> Lists:
    """One epoch of lists, in random order: a pure function of its arguments.

    Every labelled positive of the candidates' queries heads one list. A share of the lists of queries
    with re-ranker scores is denoised; in the same proportion, the denoised positives head further
    lists, denoised too. Where fewer than `list_size - 1` candidates qualify, random passages fill the
    list (`RANDOM_FILL`).

    Args:
      positives_2xN: the labelled pairs of the split: query row, passage row.
      own_2xN: further pairs that are no negatives either, passages that are the query itself.
      probability: slope and offset of `calibrate`; used only where `denoised_share` > 0.
      negative_below, positive_above: thresholds on the probability of relevance.
      num_passages: of the whole collection, to draw fills from.

    Raises:
      InputError: denoised lists are wanted and the re-ranker has not scored the candidates.
    """
    rng = np.random.default_rng([seed, epoch])
    never_negative_2xN = np.concatenate([positives_2xN, own_2xN], axis=1)
    known_QxN = known_positive(
        never_negative_2xN, candidates.query_rows_Q, candidates.passages_QxN, num_passages
    )
    scored_Q = ~np.isnan(candidates.reranker_QxN).all(axis=1)
    if denoised_share > 0:
        if not scored_Q.any():
            raise InputError(
                "config.joint.denoised_share is above 0, but the candidates have no re-ranker "
                "scores; run the mine stage first"
            )
        if negative_below > positive_above:
            raise InputError(
                f"config.mine.negative_below ({negative_below}) is above positive_above "
                f"({positive_above}), so a passage could be both; lower it"
            )
        # NaN where there is no score, which is on neither side of a threshold.
        p_QxN = relevance(candidates.reranker_QxN, probability)
        trusted_QxN = ~known_QxN & (p_QxN < negative_below)
        found_QxN = ~known_QxN & (p_QxN > positive_above)
    else:
        trusted_QxN = found_QxN = np.zeros_like(known_QxN)

    number_of = {row: i for i, row in enumerate(candidates.query_rows_Q.tolist())}
    heads = [
        (number_of[query], passage)
        for query, passage in positives_2xN.T.tolist()
        if query in number_of
    ]
    heads_Hx2 = np.array(heads, np.int64).reshape(-1, 2)
    denoised_H = np.zeros(len(heads_Hx2), bool)
    order_H = rng.permutation(len(heads_Hx2))
    scored_S = order_H[scored_Q[heads_Hx2[order_H, 0]]]
    denoised_H[scored_S[: round(denoised_share * len(scored_S))]] = True
    found_2xF = np.array(np.nonzero(found_QxN))
    taken = rng.permutation(found_2xF.shape[1])[: round(denoised_share * found_2xF.shape[1])]
    found_2xF = found_2xF[:, taken]

    query_L = np.concatenate([heads_Hx2[:, 0], found_2xF[0]])
    head_L = np.concatenate([heads_Hx2[:, 1], candidates.passages_QxN[tuple(found_2xF)]])
    denoised_L = np.concatenate([denoised_H, np.ones(len(taken), bool)])
    head_kind_L = np.repeat(
        [Provenance.LABELLED_POSITIVE, Provenance.DENOISED_POSITIVE], [len(heads_Hx2), len(taken)]
    )

    eligible_LxN = np.where(denoised_L[:, None], trusted_QxN[query_L], ~known_QxN[query_L])
    keys_LxN = np.where(eligible_LxN, rng.random(eligible_LxN.shape), np.inf)
    wanted = list_size - 1
    chosen_LxK = np.argsort(keys_LxN, axis=1)[:, :wanted]
    passages_LxP = np.full((len(query_L), list_size), -1, np.int64)
    passages_LxP[:, 0] = head_L
    found = np.take_along_axis(candidates.passages_QxN[query_L], chosen_LxK, axis=1)
    usable_LxK = np.take_along_axis(eligible_LxN, chosen_LxK, axis=1)
    passages_LxP[:, 1 : 1 + chosen_LxK.shape[1]] = np.where(usable_LxK, found, -1)
    provenance_LxP = np.where(
        denoised_L[:, None], Provenance.DENOISED_NEGATIVE, Provenance.UNDENOISED_NEGATIVE
    ).repeat(list_size, axis=1)
    provenance_LxP[:, 0] = head_kind_L
    provenance_LxP[passages_LxP < 0] = Provenance.RANDOM_FILL
    # A candidate that denoising rejects must not come back by chance.
    rejected_QxN = ~np.isnan(candidates.reranker_QxN) & ~trusted_QxN
    barred_LxN = np.where(denoised_L[:, None], rejected_QxN[query_L], found_QxN[query_L])
    barred_LxN = np.where(barred_LxN, candidates.passages_QxN[query_L], -1)
    query_rows_L = candidates.query_rows_Q[query_L]
    _fill(passages_LxP, query_rows_L, barred_LxN, never_negative_2xN, num_passages, rng)

    order_L = rng.permutation(len(query_L))
    return Lists(
        query_rows_L[order_L],
        passages_LxP[order_L],
        provenance_LxP[order_L].astype(np.uint8),
    )


def without_known_positives(lists: Lists, *, num_passages: int, seed: int) -> Lists:
    """Lists in which no negative heads another list of the same query.

    Random passages of the collection's `num_passages` stand in for them (`RANDOM_FILL`).

    Raises:
      InputError: the collection has too few passages for that.
    """
    heads_2xL = np.stack([lists.query_rows_L, lists.passages_LxP[:, 0]])
    known_LxP = known_positive(heads_2xL, lists.query_rows_L, lists.passages_LxP, num_passages)
    known_LxP[:, 0] = False
    passages_LxP = np.where(known_LxP, -1, lists.passages_LxP)
    barred_LxN = np.empty((len(passages_LxP), 0), np.int64)
    rng = np.random.default_rng(seed)
    _fill(passages_LxP, lists.query_rows_L, barred_LxN, heads_2xL, num_passages, rng)
    provenance_LxP = lists.provenance_LxP.copy()
    provenance_LxP[known_LxP] = Provenance.RANDOM_FILL
    return dataclasses.replace(lists, passages_LxP=passages_LxP, provenance_LxP=provenance_LxP)


def training_lists(stage, count: int) -> int:
    """How many lists a training stage takes by its settings, where one pass has `count`."""
    return min(round(stage.epochs * count), stage.most_lists)


def subset(count: int, most: int, seed: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, drawn at random, in random order."""
    return np.random.default_rng(seed).permutation(count)[:most]


def _fill(passages_LxP, query_rows_L, barred_LxN, positives_2xN, num_passages, rng):
    """Replaces every -1 by a random passage neither in the list nor barred nor labelled relevant."""
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
            passage = int(rng.integers(num_passages))
            while passage in excluded:
                passage = int(rng.integers(num_passages))
            excluded.add(passage)
            passages_LxP[row, column] = passage
