"""What each test query got from the models of a run, and what follows from it for a report.

Shape suffixes: Q measured queries, R re-ranked ones, K ranked passages of a query, D of them that the
re-ranker reads, C queries that two sides have, N points.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np
import scipy.stats

from rqv2_jax.data import tokens
from rqv2_jax.errors import DAMAGE, InputError, one_line
from rqv2_jax.ranking import metrics, significance
from rqv2_jax.recipe import evaluation
from rqv2_jax.recipe.evaluation import Key
from rqv2_jax.recipe.run import Run
from rqv2_jax.retrieval import rerank

TOP = 10
# Ranks of the first relevant passage that are counted together, up to these.
RANKS = (1, 3, 10, 100)


class Difference(NamedTuple):
    """The mean of a - b with its 95% interval, the p-value of a paired test, and how many queries."""

    mean: float
    low: float
    high: float
    p_value: float
    queries: int


Differences = dict[Key, Difference]


class Found(NamedTuple):
    """What a model in a state makes of the test queries, and of candidates of those re-ranked.

    `rank_Q` is that of the first relevant passage, from 1: 0 where none is ranked, -1 where the query
    is not. `first_Q` are rows of passages, -1 of none. The candidates are the first that the state's
    retriever finds, the same for both models; scores of padding are NaN.
    """

    rank_Q: np.ndarray
    first_Q: np.ndarray
    scores_RxD: np.ndarray
    relevant_RxD: np.ndarray


@dataclasses.dataclass(frozen=True)
class Measured:
    """The test queries of a run by number: ids, values of the first metric, rankings.

    A value is NaN where a model was not measured. `rows_Q` are rows of the split, `labels` the ids of
    the relevant passages of each query, `found` the rankings by (state, model).
    """

    metric: str
    ids: list[str]
    rows_Q: np.ndarray
    labels: list[frozenset[str]]
    values: dict[Key, np.ndarray]
    found: dict[tuple[str, str], Found]
    index: str
    permutations: int
    seed: int

    def interval(self, key: Key) -> tuple[float, float]:
        """Returns the 95% interval of a model's mean over the queries that all were measured on."""
        values_Q = self.values[key][_shared(self.values)]
        return significance.interval(values_Q, resamples=self.permutations, seed=self.seed)

    def difference(self, a: Key, b: Key) -> Difference:
        """Returns how two models differ on the queries that both have."""
        return _difference(self, self.values[a], self.values[b])


def _difference(measured: Measured, a_Q: np.ndarray, b_Q: np.ndarray) -> Difference:
    both_Q = ~np.isnan(a_Q) & ~np.isnan(b_Q)
    a_C, b_C, settings = a_Q[both_Q], b_Q[both_Q], measured.permutations
    mean, p_value = significance.paired_test(a_C, b_C, permutations=settings, seed=measured.seed)
    low, high = significance.interval(a_C - b_C, resamples=settings, seed=measured.seed)
    return Difference(mean, low, high, p_value, len(a_C))


def measure(run: Run, store: tokens.Store, report: dict) -> Measured:
    """Reads what evaluation left in `eval/`; InputError if a file is gone, damaged or of another one.

    `report` is what results.json holds. Rows by an index that a later evaluation has left out have no
    values.
    """
    queries, settings = store.splits["test"], run.config.evaluate
    rows_Q, reranked_R = evaluation.measured_queries(settings, queries)
    metric = next(iter(report["rows"][0]["metrics"]))
    path = run.workdir / "eval" / "test.per_query.npz"
    means = {(x["state"], x["model"], x["index"]): x["metrics"][metric] for x in report["rows"]}
    values = _values(_arrays(path), list(means), metric, len(rows_Q), reranked_R)
    shared_Q = _shared(values)
    same = (np.isclose(values_Q[shared_Q].mean(), means[key]) for key, values_Q in values.items())
    if ("joint", "retriever", settings.indexes[0]) not in values or not all(same):
        raise InputError(f"{path}: is of another evaluation than results.json")
    labels = [set[str]() for _ in rows_Q]
    least = metrics.parse_metric(metric)[2]
    for query, passage, relevance in zip(*queries.labels_of(rows_Q)):
        if relevance >= least:
            labels[query].add(store.passage_ids[passage])
    return Measured(
        metric=metric,
        ids=[queries.ids[row] for row in rows_Q],
        rows_Q=rows_Q,
        labels=[frozenset(ids) for ids in labels],
        values=values,
        found=_rankings(run, store, rows_Q, reranked_R, least),
        index=settings.indexes[0],
        permutations=settings.permutations,
        seed=run.config.seed,
    )


def _values(
    arrays: dict[str, np.ndarray], keys: list[Key], metric: str, count: int, reranked_R: np.ndarray
) -> dict[Key, np.ndarray]:
    """Returns the values [Q] of those models that have as many as were measured, NaN elsewhere."""
    values = {}
    for key in keys:
        name = f"{'.'.join(key)}.{metric}"
        places = reranked_R if key[1] == "reranker" else np.arange(count)
        if name in arrays and len(arrays[name]) == len(places):
            values[key] = np.full(count, np.nan)
            values[key][places] = arrays[name]
    return values


def _shared(values: dict[Key, np.ndarray]) -> np.ndarray:
    """Says which queries every model was measured on [Q]."""
    return ~np.isnan(np.stack(list(values.values()))).any(axis=0)


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except DAMAGE as e:
        raise InputError(f"{path}: cannot be read ({one_line(e)})") from e


def _rankings(
    run: Run, store: tokens.Store, rows_Q: np.ndarray, reranked_R: np.ndarray, least: int
) -> dict[tuple[str, str], Found]:
    """Returns the rankings of both models in the states that a report shows; none without labels."""
    qrels = store.splits["test"].labels_of(rows_Q)
    if not qrels[0].size:
        return {}
    folder, index = run.workdir / "eval", run.config.evaluate.indexes[0]

    def ranks(passages_QxK: np.ndarray) -> np.ndarray:
        relevant_QxK = metrics.relevance_of(passages_QxK, qrels) >= least
        return np.where(relevant_QxK.any(axis=1), relevant_QxK.argmax(axis=1) + 1, 0)

    rankings = {}
    for state in ("zero_shot", "reranker", "joint"):
        kept = run.kept_by(state=state, model="retriever")
        arrays = _arrays(folder / f"test.{kept}.{index}.npz")
        passages_QxK, scores_QxK = arrays["passages"], arrays["scores"]
        padded_RxK, depth = passages_QxK[reranked_R] < 0, run.config.evaluate.rerank_depth
        relevant_RxD = metrics.relevance_of(passages_QxK, qrels)[reranked_R, :depth] >= least
        scores_RxK = np.where(padded_RxK, np.nan, scores_QxK[reranked_R])
        ranked = ranks(passages_QxK), passages_QxK[:, 0]
        rankings[state, "retriever"] = Found(*ranked, scores_RxK[:, :depth], relevant_RxD)
        if state == "zero_shot":
            continue
        stage = run.kept_by(state=state, model="reranker")
        top_RxD = _arrays(folder / f"test.{stage}.reranked.{kept}.{index}.npz")["scores"]
        if top_RxD.shape != relevant_RxD.shape:
            raise InputError(f"{folder}: holds another evaluation than results.json")
        merged_RxK = rerank.merge(top_RxD, np.where(padded_RxK, 0, scores_RxK))
        order = metrics.sort_run(passages_QxK[reranked_R], merged_RxK, store.passage_ids)
        reranked_QxK = np.full(passages_QxK.shape, -1)
        reranked_QxK[reranked_R] = order[0]
        rank_Q = np.full(len(rows_Q), -1)
        rank_Q[reranked_R] = ranks(reranked_QxK)[reranked_R]
        top_RxD = np.where(padded_RxK[:, :depth], np.nan, top_RxD)
        rankings[state, "reranker"] = Found(rank_Q, reranked_QxK[:, 0], top_RxD, relevant_RxD)
    return rankings


class Moved(NamedTuple):
    """How the rank of the first relevant passage differs between two rankings of the same queries."""

    queries: int
    up: int
    same: int
    down: int
    first: tuple[int, int]  # queries with it at rank 1, before and after
    top: tuple[int, int]  # in the first TOP


def moved(before: Found, after: Found) -> Moved:
    """Counts queries by where their first relevant passage went; one that is not ranked is last."""
    ranked_Q = (before.rank_Q >= 0) & (after.rank_Q >= 0)
    a_C, b_C = (each.rank_Q[ranked_Q] for each in (before, after))
    last_a, last_b = (np.where(rank_C > 0, rank_C, np.inf) for rank_C in (a_C, b_C))
    return Moved(
        queries=int(ranked_Q.sum()),
        up=int((last_b < last_a).sum()),
        same=int((last_b == last_a).sum()),
        down=int((last_b > last_a).sum()),
        first=(int((last_a == 1).sum()), int((last_b == 1).sum())),
        top=(int((last_a <= TOP).sum()), int((last_b <= TOP).sum())),
    )


def ranks_counted(rank_C: np.ndarray) -> list[int]:
    """Counts queries by their rank, up to each of RANKS and beyond; last those without one."""
    bins = np.digitize(rank_C[rank_C > 0], RANKS, right=True)
    return [*np.bincount(bins, minlength=len(RANKS) + 1).tolist(), int((rank_C == 0).sum())]


def agreement(retriever: Found, reranker: Found) -> float:
    """Returns Spearman's correlation of both models' scores of a query's candidates, on average.

    NaN if no query has candidates that both tell apart.
    """
    rhos = []
    for a_D, b_D in zip(retriever.scores_RxD, reranker.scores_RxD):
        real_D = ~np.isnan(a_D) & ~np.isnan(b_D)
        a_D, b_D = a_D[real_D], b_D[real_D]
        if len(np.unique(a_D)) > 1 and len(np.unique(b_D)) > 1:
            rhos.append(np.corrcoef(*(scipy.stats.rankdata(each) for each in (a_D, b_D)))[0, 1])
    return float(np.mean(rhos)) if rhos else float("nan")


class Side(NamedTuple):
    """The retriever of a run in a state."""

    measured: Measured
    state: str

    @property
    def key(self) -> Key:
        """Returns its key among the values."""
        return self.state, "retriever", self.measured.index

    @property
    def rank_Q(self) -> np.ndarray:
        """Returns the rank of the first relevant passage, as `Found` has it."""
        return self.measured.found[self.state, "retriever"].rank_Q

    @property
    def first_Q(self) -> np.ndarray:
        """Returns the row of the passage ranked first, as `Found` has it."""
        return self.measured.found[self.state, "retriever"].first_Q


def common(a: Measured, b: Measured) -> tuple[np.ndarray, np.ndarray]:
    """Returns numbers [C] in both runs of the queries with one id and the same labels.

    Raises InputError if there are none, or the runs have other metrics.
    """
    if a.metric != b.metric:
        raise InputError(f"one run is measured by {a.metric}, the other by {b.metric}")
    places = {(key, labels): number for number, (key, labels) in enumerate(zip(b.ids, b.labels))}
    pairs = [
        (number, places[key]) for number, key in enumerate(zip(a.ids, a.labels)) if key in places
    ]
    if not pairs:
        raise InputError("the runs have no test query in common, by id and relevant passages")
    a_C, b_C = np.array(pairs, np.int64).T
    return a_C, b_C


def won_and_lost(before: Side, after: Side, count: int) -> tuple[list, list, tuple[int, int, int]]:
    """Returns pairs of query numbers, before and after, of the `count` largest gains and losses.

    By the first metric, the largest first; also how many queries are won, equal and lost.
    """
    a_C, b_C = common(before.measured, after.measured)
    gain_C = after.measured.values[after.key][b_C] - before.measured.values[before.key][a_C]
    won, lost = (
        [
            (int(a_C[number]), int(b_C[number]))
            for number in np.argsort(-sign * gain_C, kind="stable")
            if sign * gain_C[number] > 0
        ]
        for sign in (1, -1)
    )
    counts = len(won), len(gain_C) - len(won) - len(lost), len(lost)
    return won[:count], lost[:count], counts


def differences(a: Measured, b: Measured) -> Differences:
    """Returns a - b for every model that both runs have, on the queries of `common`."""
    a_C, b_C = common(a, b)
    return {
        key: _difference(a, a.values[key][a_C], b.values[key][b_C])
        for key in a.values
        if key in b.values
    }
