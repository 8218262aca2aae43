"""Ranking metrics, their tie rule, a paired significance test and TREC run files.

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
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.stats

from rqv2_jax.data import collection
from rqv2_jax.errors import InputError

Qrels = tuple[np.ndarray, np.ndarray, np.ndarray]

# With 16 queries that differ there are 65,536 flips: cheap to count all of them.
_EXACT_QUERIES = 16
_FLIPS_PER_CHUNK = 2**22


def sort_run(
    passages_QxK: np.ndarray, scores_QxK: np.ndarray, passage_ids: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the run `(passages_QxK, scores_QxK)` in rank order, by the module's tie rule.

    Padding comes last, as passage -1 with score -inf; what score it had does not matter.

    Raises:
      InputError: a score is NaN, or a query has a passage twice.
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
    return (
        np.take_along_axis(passages_QxK, order_QxK, axis=1),
        np.take_along_axis(scores_QxK, order_QxK, axis=1),
    )


def relevance_of(passages_QxK: np.ndarray, qrels: Qrels) -> np.ndarray:
    """Returns relevance_QxK (int, 0 or more); padding and unjudged passages have 0.

    Raises:
      InputError: the qrels judge a pair twice.
    """
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
    wanted_QxK = np.arange(len(passages_QxK))[:, None] * stride + passages_QxK
    found_QxK = np.minimum(np.searchsorted(pairs_N, wanted_QxK), len(pairs_N) - 1)
    judged_QxK = (pairs_N[found_QxK] == wanted_QxK) & (passages_QxK >= 0)
    return np.where(judged_QxK, np.maximum(relevances_N[order_N][found_QxK], 0), 0)


def judged_queries(qrels: Qrels) -> np.ndarray:
    """Returns rows_J, ascending: the queries with a relevant passage, over which metrics are means.

    Raises:
      InputError: there is none.
    """
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
    """Returns measure, cutoff and least relevance of a name such as `nDCG@10` or `RR(rel=2)@10`.

    Raises:
      InputError: the name is not known.
    """
    match = re.fullmatch(r"(?:(RR|Success|R)(?:\(rel=([1-9]\d*)\))?|(nDCG))@([1-9]\d*)", name, re.A)
    if not match:
        raise InputError(
            f"unknown metric {name!r}: known are RR@k, Success@k, R@k and nDCG@k with k from 1, the "
            "first three also as RR(rel=2)@k"
        )
    return match[1] or match[3], int(match[4]), int(match[2] or 1)


def at_relevance(names: Sequence[str], min_relevance: int) -> tuple[str, ...]:
    """The same metrics where passages are relevant from `min_relevance` on: `RR(rel=2)@10`.

    What says so itself and nDCG, whose gains are the relevances, keep their names.
    """
    if min_relevance == 1:
        return tuple(names)
    said = rf"\1(rel={min_relevance})@"
    return tuple(re.sub("^(RR|Success|R)@", said, name) for name in names)


def check_measurable(names: Sequence[str], relevance_N: np.ndarray | None):
    """Raises InputError unless labels of these relevances can give metrics of these names.

    None where only what was retrieved is judged, as by answers: then there is nothing to tell what
    depends on all relevant passages, and a passage is relevant or not.
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

    Where only what was retrieved is judged, as by answers, `rows_J` gives the queries instead, and
    what depends on all relevant passages (`R@k`, `nDCG@k`) cannot be measured.

    The run is put into rank order first. A judged query without results has 0; queries without a
    relevant passage are left out (ir-measures counts those that have a judgement as 0).

    - `RR@k`: 1 / rank of the first relevant passage, 0 if it is beyond k.
    - `Success@k`: 1 if the first k hold a relevant passage, else 0. Often called recall@k.
    - `R@k`: the part of the relevant passages that the first k hold.
    - `RR(rel=2)@k` and so on: the same where passages are relevant from 2 on. A query whose
      passages are all below has 0, so all metrics are over the same queries.
    - `nDCG@k`: gain is the relevance, the discount log2(rank + 1), the ideal over all judgements.

    Raises:
      InputError: an unknown name, one that cannot be measured, no relevant passage, a judged query
        beyond the run, or what `sort_run` and `relevance_of` raise.
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


def paired_test(
    a_Q: np.ndarray, b_Q: np.ndarray, *, permutations: int, seed: int
) -> tuple[float, float]:
    """Returns `(mean(a - b), p_value)` of the two-sided paired randomisation test.

    Under the null hypothesis a and b may be swapped for each query, so the sign of each difference
    may be flipped (Smucker, Allan and Carterette 2007). With at most 16 queries that differ all
    flips are counted and p is exact; else p = (1 + count) / (1 + permutations) over random flips.

    Raises:
      InputError: the two are not finite values of the same queries.
    """
    a_Q, b_Q = np.asarray(a_Q, np.float64), np.asarray(b_Q, np.float64)
    finite = np.isfinite(a_Q).all() and np.isfinite(b_Q).all()
    if a_Q.shape != b_Q.shape or not a_Q.size or not finite:
        raise InputError(
            f"a paired test needs finite values of the same queries, not shapes {a_Q.shape} and"
            f" {b_Q.shape}: evaluate both runs on the same qrels"
        )
    difference_Q = a_Q - b_Q
    # A query without a difference adds nothing to any sum.
    moving_D = difference_Q[difference_Q != 0]
    total = moving_D.sum()
    # Flips whose sum equals the total in exact arithmetic count, whatever their rounding.
    threshold = abs(total) - 1e-9 * np.abs(moving_D).sum()

    def count_extreme(flips_PxD: np.ndarray) -> int:
        sums_P = total - 2 * (flips_PxD.astype(np.float64) @ moving_D)
        return int((np.abs(sums_P) >= threshold).sum())

    mean, num_moving = float(difference_Q.mean()), len(moving_D)
    if num_moving <= _EXACT_QUERIES:
        flips_PxD = np.arange(2**num_moving)[:, None] >> np.arange(num_moving) & 1
        return mean, count_extreme(flips_PxD) / 2**num_moving

    rng = np.random.default_rng(seed)
    extreme, chunk = 0, max(1, _FLIPS_PER_CHUNK // num_moving)
    for start in range(0, permutations, chunk):
        shape = (min(chunk, permutations - start), -(-num_moving // 8))
        bits = rng.integers(0, 256, shape, np.uint8)
        extreme += count_extreme(np.unpackbits(bits, axis=1, count=num_moving))
    return mean, (1 + extreme) / (1 + permutations)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, family-wise, by the step-down rule of Holm (1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        corrected[i] = min(largest, 1.0)
    return corrected


def interval(difference_Q: np.ndarray, *, resamples: int, seed: int) -> tuple[float, float]:
    """95% bootstrap interval (percentiles) of the mean over queries."""
    if not np.any(difference_Q != difference_Q[0]):
        return float(difference_Q[0]), float(difference_Q[0])
    found = scipy.stats.bootstrap(
        (difference_Q,),
        np.mean,
        n_resamples=resamples,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def write_trec_run(
    path: str | os.PathLike[str],
    query_ids: Sequence[str],
    passage_ids: Sequence[str],
    passages_QxK: np.ndarray,
    scores_QxK: np.ndarray,
    tag: str,
) -> None:
    """Writes the run in rank order as lines `qid Q0 docid rank score tag`, ranks from 1.

    Scores have the nine digits from which a float32 is restored exactly, so ties neither arise nor
    vanish. The file is written under a temporary name and renamed when it is whole.

    Raises:
      InputError: an id or the tag is empty or has white space, or what `sort_run` raises.
    """
    passages_QxK, scores_QxK = sort_run(passages_QxK, scores_QxK, passage_ids)
    listed_rows = np.unique(passages_QxK[passages_QxK >= 0]).tolist()
    listed_ids = {row: passage_ids[row] for row in listed_rows}
    for what, names in (("query", query_ids), ("passage", listed_ids.values()), ("tag", [tag])):
        for name in names:
            if name.split() != [name]:
                raise InputError(
                    f"{path}: {what} {str(name)!r} is empty or has white space, which separates the"
                    " columns of a TREC run file: rename it"
                )
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for query_id, passages_K, scores_K in zip(query_ids, passages_QxK, scores_QxK, strict=True):
            results = zip(passages_K[passages_K >= 0].tolist(), scores_K.tolist())
            file.writelines(
                f"{query_id} Q0 {listed_ids[row]} {rank} {score:.9g} {tag}\n"
                for rank, (row, score) in enumerate(results, start=1)
            )
    os.replace(temporary, path)


def read_trec_run(path: str | os.PathLike[str]) -> dict[str, list[tuple[str, float]]]:
    """Returns each query's `(passage id, score)` pairs in the order of a run file, gzipped or not.

    Takes TREC's lines `qid Q0 docid rank score tag`, MS MARCO's `qid docid rank`, in which minus the
    rank is the score, and RocketQA's `qid docid rank score`; columns are separated by white space. As
    float32 the scores are bit for bit those that `write_trec_run` was given.

    Where there are scores, ranks are not read, for it is the scores that rank (`sort_run`). Empty
    lines are skipped.

    Raises:
      InputError: a line that is none of these or not as the first one, a score or rank that is no
        number, a passage listed twice for a query, text that is not UTF-8, or a file that cannot be
        read.
    """
    scores_by_query: dict[str, dict[str, float]] = {}
    width = 0
    for number, line in collection.lines(collection.open_file(Path(path))):
        columns, where = line.split(), f"{path}:{number}"
        width = width or len(columns)
        if len(columns) != width or width not in _RUN_COLUMNS:
            raise InputError(
                f"{where}: {len(columns)} columns, but a line of a run has six, "
                "`qid Q0 docid rank score tag`, or three or four, `qid docid rank [score]`, all alike"
            )
        query, passage, score = _parse_run_line(columns, where)
        scores = scores_by_query.setdefault(query, {})
        if passage in scores:
            raise InputError(
                f"{where}: passage {passage} is listed twice for query {query}: keep one of them"
            )
        scores[passage] = score
    return {query: list(scores.items()) for query, scores in scores_by_query.items()}


def run_arrays(
    listed: Mapping[str, Sequence[tuple[str, float]]],
    query_ids: Sequence[str],
    passage_rows: Mapping[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the run `(passages_QxK, scores_QxK)` of what `read_trec_run` has read.

    A row for each of `query_ids`, all padding where the file does not name the query; K is that of
    the longest. `passage_rows` has every listed passage's row number.
    """
    found = [listed.get(query, ()) for query in query_ids]
    shape = len(query_ids), max(map(len, found), default=0)
    passages_QxK, scores_QxK = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
    for row, pairs in enumerate(found):
        passages_QxK[row, : len(pairs)] = [passage_rows[passage] for passage, _ in pairs]
        scores_QxK[row, : len(pairs)] = [score for _, score in pairs]
    return passages_QxK, scores_QxK


# Which columns of a run file hold passage, rank and score, by how many there are.
_RUN_COLUMNS = {6: (2, None, 4), 3: (1, 2, None), 4: (1, 2, 3)}


def _parse_run_line(columns: list[str], where: str) -> tuple[str, str, float]:
    passage, rank, score = _RUN_COLUMNS[len(columns)]
    value = np.nan
    for what, column, read in (("rank", rank, lambda text: -int(text)), ("score", score, float)):
        if column is None:
            continue
        try:
            value = float(read(columns[column]))
        except ValueError:
            value = np.nan
        if np.isnan(value):
            raise InputError(f"{where}: the {what} {columns[column]!r} is not a number: correct it")
    return columns[0], columns[passage], value
