"""Ranking metrics of runs and their tie rule.

A *run* is two arrays with a row for every query of a split: `passages_QxK`, passage row numbers in
which a negative number is padding, and `scores_QxK`. A query without results is a row of padding.

*Qrels* are three arrays `(query_rows_N, passage_rows_N, relevances_N)`, one entry per judgement.
A query row is a row of the run. A passage is relevant from relevance 1 on, or from the one that the
measure's name gives; an unjudged passage has relevance 0, and a negative judgement counts as 0.

**Tie rule** (trec_eval's). Scores are compared as float32, and equal scores are ordered by passage
id, lexicographically descending (by code point, which is the byte order of UTF-8). The rule sees
neither relevance nor the order of the list, so a constant scorer scores at chance. ir-measures
agrees on ties wherever pytrec_eval computes the measure. It does not compute `RR@k`: ir-measures
takes that from MS MARCO's script, which orders equal scores by *ascending* id. On a run with ties,
`RR@k` here is pytrec_eval's `RR`, with 0 where the rank is beyond k.

Source of the measures: trec_eval (`recip_rank`, `success`, `recall`, `ndcg_cut`), under the names
that ir-measures gives them (MacAvaney et al. 2022).

Shape suffixes: Q queries of the split, K results of a query, N judgements, J judged queries, T tied
passages.
"""

import re
from collections.abc import Sequence

import numpy as np

from rqv2_jax.errors import InputError

Qrels = tuple[np.ndarray, np.ndarray, np.ndarray]


def sort_run(
    passages_QxK: np.ndarray, scores_QxK: np.ndarray, passage_ids: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the run `(passages_QxK, scores_QxK)` in rank order, by the module's tie rule.

    Padding comes last, as passage -1 with score -inf; what score it had does not matter. Raises
    InputError if a score is NaN, or a query has a passage twice.
    """
    present_QxK = passages_QxK >= 0
    passages_QxK = np.where(present_QxK, passages_QxK, -1)
    scores_QxK = np.where(present_QxK, scores_QxK, -np.inf).astype(np.float32)
    if np.isnan(scores_QxK).any():
        query, column = np.argwhere(np.isnan(scores_QxK))[0]
        raise InputError(
            f"the score of passage {passage_ids[passages_QxK[query, column]]} for query row {query}"
            " is NaN: check the model's weights and inputs"
        )
    by_row_QxK = np.sort(passages_QxK, axis=1)
    twice_QxK = (by_row_QxK[:, 1:] == by_row_QxK[:, :-1]) & (by_row_QxK[:, 1:] >= 0)
    if twice_QxK.any():
        query, column = np.argwhere(twice_QxK)[0]
        raise InputError(
            f"query row {query} has passage {passage_ids[by_row_QxK[query, column]]} twice:"
            " keep one of them"
        )

    passages_QxK, scores_QxK = _reorder(np.argsort(-scores_QxK, axis=1), passages_QxK, scores_QxK)
    same_QxK = scores_QxK[:, 1:] == scores_QxK[:, :-1]
    tied_QxK = np.zeros(passages_QxK.shape, bool)
    tied_QxK[:, 1:] |= same_QxK
    tied_QxK[:, :-1] |= same_QxK
    tied_QxK &= passages_QxK >= 0
    # Only the ids in a tie are compared: sorting all of them would take most of the time.
    tied_rows_T, inverse = np.unique(passages_QxK[tied_QxK], return_inverse=True)
    tied_ids = [passage_ids[row] for row in tied_rows_T.tolist()]
    id_order_T = np.empty(len(tied_ids), np.int64)
    id_order_T[sorted(range(len(tied_ids)), key=tied_ids.__getitem__)] = np.arange(len(tied_ids))
    # Padding keeps -1, behind a passage whose score is -inf too.
    id_order_QxK = np.full(passages_QxK.shape, -1)
    id_order_QxK[tied_QxK] = id_order_T[inverse]
    return _reorder(np.lexsort((-id_order_QxK, -scores_QxK), axis=1), passages_QxK, scores_QxK)


def _reorder(
    order_QxK: np.ndarray, passages_QxK: np.ndarray, scores_QxK: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    rows_Qx1 = np.arange(len(order_QxK))[:, None]
    return passages_QxK[rows_Qx1, order_QxK], scores_QxK[rows_Qx1, order_QxK]


def relevance_of(passages_QxK: np.ndarray, qrels: Qrels) -> np.ndarray:
    """Returns relevance_QxK (int), 0 for padding and unjudged; InputError if judged twice."""
    query_rows_N, passage_rows_N, relevances_N = qrels
    if not len(query_rows_N):
        return np.zeros(passages_QxK.shape, np.int64)
    stride = int(max(passage_rows_N.max(), passages_QxK.max(initial=0))) + 1
    pairs_N = query_rows_N.astype(np.int64) * stride + passage_rows_N
    order_N = np.argsort(pairs_N)
    pairs_N = pairs_N[order_N]
    twice = np.flatnonzero(pairs_N[1:] == pairs_N[:-1])
    if len(twice):
        query, passage = divmod(int(pairs_N[twice[0]]), stride)
        raise InputError(
            f"the qrels judge query row {query} with passage row {passage} twice: keep one of them"
        )
    pairs_QxK = np.arange(len(passages_QxK))[:, None] * stride + passages_QxK
    place_QxK = np.minimum(np.searchsorted(pairs_N, pairs_QxK), len(pairs_N) - 1)
    judged_QxK = (pairs_N[place_QxK] == pairs_QxK) & (passages_QxK >= 0)
    return np.where(judged_QxK, np.maximum(relevances_N[order_N][place_QxK], 0), 0)


def judged_queries(qrels: Qrels) -> np.ndarray:
    """Returns rows_J, ascending: queries with a relevant passage; InputError if there is none."""
    query_rows_N, _, relevances_N = qrels
    rows_J = np.unique(query_rows_N[relevances_N >= 1])
    if not len(rows_J):
        raise InputError(
            "the qrels hold no relevant passage (relevance 1 or more), so there is nothing to"
            " measure: check that they belong to this split"
        )
    return rows_J


def num_relevant(qrels: Qrels, num_queries: int, min_relevance: int) -> np.ndarray:
    """Returns num_relevant_Q, how many passages have relevance `min_relevance` or more."""
    query_rows_N, _, relevances_N = qrels
    return np.bincount(query_rows_N[relevances_N >= min_relevance], minlength=num_queries)


def ideal_dcg(qrels: Qrels, num_queries: int, k: int) -> np.ndarray:
    """Returns ideal_dcg_Q, the DCG@k of each query's judged passages in the best order."""
    query_rows_N, _, relevances_N = qrels
    gains_N = np.maximum(relevances_N, 0).astype(np.int64)
    order_N = np.lexsort((-gains_N, query_rows_N))
    query_rows_N, gains_N = query_rows_N[order_N], gains_N[order_N]
    rank_N = np.arange(len(query_rows_N)) - np.searchsorted(query_rows_N, query_rows_N) + 1
    dcg_N = np.where(rank_N <= k, gains_N / np.log2(rank_N + 1), 0)
    return np.bincount(query_rows_N, weights=dcg_N, minlength=num_queries)


def parse_metric(name: str) -> tuple[str, int, int]:
    """Returns measure, cutoff and least relevance of a name such as `nDCG@10` or `RR(rel=2)@10`."""
    match = re.fullmatch(r"(?:(RR|Success|R)(?:\(rel=([1-9]\d*)\))?|(nDCG))@([1-9]\d*)", name, re.A)
    if not match:
        raise InputError(
            f"unknown metric {name!r}: known are RR@k, Success@k, R@k and nDCG@k with k from 1, the "
            "first three also as RR(rel=2)@k"
        )
    return match[1] or match[3], int(match[4]), int(match[2] or 1)


def at_relevance(names: Sequence[str], min_relevance: int) -> tuple[str, ...]:
    """Returns the names where passages are relevant from `min_relevance` on: `RR(rel=2)@10`.

    Names that give a relevance, and nDCG, whose gains are the relevances, stay as they are.
    """
    if min_relevance == 1:
        return tuple(names)
    renamed = rf"\1(rel={min_relevance})@"
    return tuple(re.sub("^(RR|Success|R)@", renamed, name) for name in names)


def check_measurable(names: Sequence[str], relevance_N: np.ndarray | None) -> None:
    """Raises InputError unless labels of these relevances can give metrics of these names.

    None where only retrieved passages are judged, as by answers: metrics that depend on all relevant
    passages cannot be measured then, and a passage is relevant or not.
    """
    for name in names:
        measure, _, least = parse_metric(name)
        if relevance_N is None and measure in ("R", "nDCG"):
            raise InputError(
                f"config.evaluate.metrics: {name} needs labels of all relevant passages, but this "
                "split has answers; take RR@k and Success@k"
            )
        if least > 1 and (relevance_N is None or not (relevance_N >= least).any()):
            raise InputError(
                f"{name}: the labels hold no passage of relevance {least} or more; lower "
                "min_relevance, or take another metric"
            )


def evaluate(
    passages_QxK: np.ndarray,
    scores_QxK: np.ndarray,
    passage_ids: Sequence[str],
    qrels: Qrels,
    names: Sequence[str],
    rows_J: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Returns values_J by metric name, one for each of `judged_queries(qrels)`.

    Where only retrieved passages are judged, as by answers, `rows_J` gives the queries instead, and
    metrics that depend on all relevant passages (`R@k`, `nDCG@k`) cannot be measured.

    The run is put into rank order first. A judged query without results has 0; queries without a
    relevant passage are left out (ir-measures counts those that have a judgement as 0). Raises
    InputError for what cannot be measured, as `sort_run` and `relevance_of` do.

    - `RR@k`: 1 / rank of the first relevant passage, 0 if it is beyond k.
    - `Success@k`: 1 if the first k hold a relevant passage, else 0. Often called recall@k.
    - `R@k`: the part of the relevant passages that the first k hold.
    - `RR(rel=2)@k` and so on: the same where passages are relevant from 2 on. A query whose
      passages are all below has 0, so all metrics are over the same queries.
    - `nDCG@k`: gain is the relevance, the discount log2(rank + 1), the ideal over all judgements.
    """
    check_measurable(names, qrels[2] if rows_J is None else None)
    rows_J = judged_queries(qrels) if rows_J is None else rows_J
    num_queries = len(passages_QxK)
    if qrels[0].max(initial=0) >= num_queries:
        raise InputError(
            f"the qrels judge query row {qrels[0].max()} and the run has {num_queries} rows:"
            " the run needs a row for every query of the split, of padding if without results"
        )
    passages_QxK, _ = sort_run(passages_QxK, scores_QxK, passage_ids)
    relevance_JxK = relevance_of(passages_QxK, qrels)[rows_J]

    values = {}
    for name in names:
        measure, k, least = parse_metric(name)
        top_JxK = relevance_JxK[:, :k]
        hit_JxK = top_JxK >= least
        rank_K = np.arange(top_JxK.shape[1]) + 1
        match measure:
            case "RR":
                values_J = (hit_JxK / rank_K).max(axis=1, initial=0)
            case "Success":
                values_J = hit_JxK.any(axis=1).astype(np.float64)
            case "R":
                relevant_J = num_relevant(qrels, num_queries, least)[rows_J]
                values_J = hit_JxK.sum(axis=1) / np.maximum(relevant_J, 1)
            case "nDCG":
                dcg_J = (top_JxK / np.log2(rank_K + 1)).sum(axis=1)
                values_J = dcg_J / ideal_dcg(qrels, num_queries, k)[rows_J]
        values[name] = values_J
    return values
