"""The evaluation of floors and model states on a split, and of re-rankers on given candidates.

A scoreboard has a row of metrics for every model; significance tests and a verdict compare them. Shape
suffixes: Q queries, R queries that are re-ranked, K passages of a query, best first, N labels.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from rqv2_jax import artifacts, hosts
from rqv2_jax.data import collection, tokens
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import answers as answers_lib
from rqv2_jax.ranking import metrics, significance, trec
from rqv2_jax.recipe import rankings, results
from rqv2_jax.recipe.rankings import Ranking
from rqv2_jax.recipe.run import STATES, Run
from rqv2_jax.recipe.texts import texts_of
from rqv2_jax.retrieval import bm25, rerank

# The re-ranker is trained from state reranker on.
RERANKED = ("reranker", "joint")
# States that are not trained and that training has to beat.
FLOORS = ("bm25", "released")

Key = tuple[str, str, str]  # state, model, index
Values = dict[str, np.ndarray]  # of each query, by metric


class Entry(NamedTuple):
    """One model's queries, each one's value by metric, and what else its row of the table has."""

    rows_Q: np.ndarray
    values: Values
    extra: dict


def measured_queries(
    settings: ml_collections.ConfigDict, queries: tokens.Queries
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows that are measured [Q], and which are re-ranked [R]; the same for every seed."""
    rows_Q = np.sort(lists_lib.subset(len(queries.ids), settings.queries, 0))
    return rows_Q, np.sort(lists_lib.subset(len(rows_Q), settings.rerank_queries, 0))


def check_metrics(settings: ml_collections.ConfigDict, queries: tokens.Queries) -> None:
    """Raises InputError unless the labels of queries can give the metrics of `config.evaluate`."""
    names = metrics.at_relevance(settings.metrics, settings.min_relevance)
    relevance_N = None
    if queries.qrels_3xN.size:
        rows_Q, reranked_R = measured_queries(settings, queries)
        *_, relevance_N = queries.labels_of(rows_Q[reranked_R])
    metrics.check_measurable(names, relevance_N)


def _by_answers(
    store: tokens.Store, texts: collection.Collection, split: str
) -> Callable[..., Values]:
    """Returns a `measure` for a split without labels: passages that hold an answer are relevant."""
    answers = [query.answers for query in texts.queries(split)]
    passages: dict[int, str] = {}

    def measure(rows_Q: np.ndarray, ranking: Ranking, names: Sequence[str]) -> Values:
        deepest = max(metrics.parse_metric(name)[1] for name in names)
        ordered = metrics.sort_run(*ranking, store.passage_ids)
        top_QxK, scores_QxK = (array[:, :deepest] for array in ordered)
        unread = set(top_QxK[top_QxK >= 0].tolist()) - passages.keys()
        if unread:
            for row, passage in enumerate(texts.passages()):
                if row in unread:
                    passages[row] = answers_lib.joined(passage.text)
        qrels = answers_lib.judge(top_QxK, [answers[row] for row in rows_Q], passages)
        every_Q = np.arange(len(rows_Q))
        return metrics.evaluate(top_QxK, scores_QxK, store.passage_ids, qrels, names, every_Q)

    return measure


class Scoreboard:
    """The metrics of every model that is added, for queries of a split; writes their run files."""

    def __init__(self, run: Run, store: tokens.Store, split: str):
        if split not in store.splits:
            raise InputError(f"--split {split}: the data has only {', '.join(store.splits)}")
        self.run, self.store, self.split = run, store, split
        self.queries = store.splits[split]
        settings = run.config.evaluate
        self.metrics = metrics.at_relevance(settings.metrics, settings.min_relevance)
        self.rows_Q, self.reranked_R = measured_queries(settings, self.queries)
        self.entries: dict[Key, Entry] = {}
        self.reachable: dict[str, float] = {}
        if self.queries.qrels_3xN.size:
            self._measure = self._by_labels
        else:
            self._measure = _by_answers(store, texts_of(run, store.fingerprint), split)
        hosts.from_first(lambda: (run.workdir / "runs").mkdir(exist_ok=True))

    def _by_labels(self, rows_Q: np.ndarray, ranking: Ranking, names: Sequence[str]) -> Values:
        """Returns the value of each metric for each query, by the labels of the split."""
        qrels = self.queries.labels_of(rows_Q)
        return metrics.evaluate(*ranking, self.store.passage_ids, qrels, names)

    def add(self, key: Key, rows_Q: np.ndarray, ranking: Ranking, **extra) -> None:
        """Measures what a model found, or re-ranked, for the queries in these rows of the split."""
        path = self.run.workdir / "runs" / f"{self.split}.{'.'.join(key)}.trec"
        tag, query_ids = f"rqv2_jax.{key[0]}.{key[1]}", [self.queries.ids[row] for row in rows_Q]
        hosts.from_first(
            lambda: trec.write_run(path, query_ids, self.store.passage_ids, *ranking, tag)
        )
        values = self._measure(rows_Q, ranking, self.metrics)
        self.entries[key] = Entry(rows_Q, values, extra)

    def add_reranked(
        self, ranking: Ranking, *, state: str, index: str, retriever: tuple[str, ...] = ()
    ) -> None:
        """Adds how the re-ranker of a state ranks the first candidates of the re-ranked queries.

        `ranking` is that of all queries that are measured, by the system that found the candidates:
        if it is a retriever of this run, `retriever` names the stage that has its params.
        """
        run, settings = self.run, self.run.config.evaluate
        rows_R, depth = self.rows_Q[self.reranked_R], settings.rerank_depth
        passages_RxK, scores_RxK = (array[self.reranked_R] for array in ranking)
        scores_RxK = np.where(passages_RxK < 0, 0, scores_RxK)
        top_RxK = passages_RxK[:, :depth]

        def compute():
            params = run.params(state=state, model="reranker")
            pairs = self.store, self.queries.texts, rows_R, top_RxK
            return {"scores": rerank.scores(run.forward, params, *pairs)}

        stage = run.kept_by(state=state, model="reranker")
        parts = (self.split, stage, "reranked", *retriever, index, "npz")
        path = run.workdir / "eval" / ".".join(parts)
        origin = run.origin(state=state, model="reranker")
        source = f"{origin} {self.store.fingerprint} {self.queries.fingerprint}"
        source = artifacts.digest(source, rows_R, top_RxK)
        merged_RxK = rerank.merge(artifacts.cached(path, source, compute)["scores"], scores_RxK)
        self.add((state, "reranker", index), rows_R, (passages_RxK, merged_RxK))
        reached = metrics.at_relevance((f"Success@{depth}",), settings.min_relevance)
        (values_R,) = self._measure(rows_R, (top_RxK, scores_RxK[:, :depth]), reached).values()
        self.reachable[index] = float(values_R.mean())

    def _table(self) -> list[dict]:
        """Returns the rows of the table, all over the queries that every model was measured on."""
        rows, every = [], (entry.rows_Q for entry in self.entries.values())
        shared = functools.reduce(np.intersect1d, every)
        for (state, model, index), (rows_Q, values, extra) in self.entries.items():
            among = np.isin(rows_Q, shared)
            row: dict[str, Any] = {"state": state, "model": model, "split": self.split}
            row |= {"index": index, "queries": len(shared)}
            row |= {"metrics": {m: float(v[among].mean()) for m, v in values.items()}} | extra
            if len(rows_Q) > len(shared):
                means = {m: float(v.mean()) for m, v in values.items()}
                row["all_queries"] = {"queries": len(rows_Q), "metrics": means}
            rows.append(row)
        return rows

    def _compare(self, a: Key, b: Key) -> dict:
        """Returns the significance test of two entries, over the queries that both have."""
        settings, metric = self.run.config.evaluate, self.metrics[0]
        entries = self.entries[a], self.entries[b]
        common = np.intersect1d(entries[0].rows_Q, entries[1].rows_Q)
        values = (entry.values[metric][np.isin(entry.rows_Q, common)] for entry in entries)
        difference, p_value = significance.paired_test(
            *values, permutations=settings.permutations, seed=self.run.config.seed
        )
        names = {"a": results.name(*a), "b": results.name(*b), "metric": metric}
        return {**names, "queries": len(common), "difference": difference, "p_value": p_value}

    def _against_floors(self, first: str) -> list[tuple[Key, Key]]:
        """Returns pairs of a trained state's entry and one that it has to beat."""
        trained, floors = set(STATES) - {"zero_shot"}, set(FLOORS)
        keys = [key for key in self.entries if key[2] in (first, "bm25") or key[0] in floors]
        return [(a, b) for a in keys for b in keys if a[0] in trained and b[0] in floors]

    def write(self, name: str, pairs: Iterable[tuple[Key, Key]], first: str) -> dict:
        """Compares pairs of entries, as far as they were added; writes `eval/<name>.*`.

        Adds the pairs of what the index `first` finds and the floors, and the verdict of the last
        state.
        """
        run, against_floors = self.run, self._against_floors(first)
        pairs = [pair for pair in (*pairs, *against_floors) if set(pair) <= set(self.entries)]
        tests = {pair: self._compare(*pair) for pair in dict.fromkeys(pairs)}
        last = max((a[0] for a, _ in against_floors), key=STATES.index, default=None)
        verdict = [(a, tests[a, b]) for a, b in against_floors if a[0] == last]
        report: dict[str, Any] = {
            "rows": self._table(),
            "significance": list(tests.values()),
            "verdict": results.verdict([test for _, test in verdict]),
            "titles": run.config.data.titles and len(self.store.titles.tokens) > 0,
        }
        worse = {key for key, test in verdict if results.told(test) == "worse than"}
        if worse:
            report["verdict"] += results.advice(run, self.store, worse, self.reachable)
        arrays = {
            f"{'.'.join(key)}.{metric}": values_Q
            for key, entry in self.entries.items()
            for metric, values_Q in entry.values.items()
        }
        folder = run.workdir / "eval"
        artifacts.write_arrays(folder / f"{name}.per_query.npz", arrays)
        artifacts.write_text(folder / f"{name}.json", json.dumps(report, indent=1) + "\n")
        return report


def evaluate(
    run: Run,
    store: tokens.Store,
    split: str,
    indexes: tuple[str, ...],
    states: tuple[str, ...] = STATES,
) -> dict:
    """Evaluates retrieval and re-ranking of floors and states on a split, as `results.json` has it.

    The floors are BM25 and the starting retriever as its folder has it (state "released"). Retrieves
    with exact search and, if asked for, with ScaNN; the re-ranker re-ranks what its own state's
    retriever found by the first of `indexes`, and what BM25 found (index "bm25"). Where not all
    queries are re-ranked, `evaluate.rerank_queries` of them are, one random sample with a fixed seed:
    the `metrics` of every row are over that sample, and `all_queries` has those of rows that were
    measured on more. A significance test takes all queries that both sides were measured on.

    Writes `runs/*.trec`, `eval/<split>.json` and, as `<state>.<model>.<index>.<metric>`, the value of
    each query the model was measured on, in their order, in `eval/<split>.per_query.npz`. Raises
    InputError if the split is not there, or a stage has not been run.
    """
    board, first = Scoreboard(run, store, split), indexes[0]
    rows_Q, asked = board.rows_Q, (run, store, split, board.rows_Q)
    by_bm25 = rankings.by_bm25(*asked)
    if by_bm25:
        parameters = bm25.described(run.config.evaluate.bm25)
        board.add(("bm25", "bm25", "bm25"), rows_Q, by_bm25, parameters=parameters)
    by_released = rankings.by_released(*asked)
    if by_released:
        board.add(("released", "retriever", "exact"), rows_Q, by_released)
    for state in states:
        if state == "retriever" and run.config.retriever.epochs == 0:
            continue
        retrieved = {}
        for index in indexes:
            retrieved[index], recalls = rankings.retrieve_split(
                *asked, state=state, index_name=index
            )
            # The re-ranker's warm-up leaves the retriever as it was.
            if state != "reranker":
                board.add((state, "retriever", index), rows_Q, retrieved[index], **recalls)
        if state in RERANKED:
            found_by = (run.kept_by(state=state, model="retriever"),)
            board.add_reranked(retrieved[first], state=state, index=first, retriever=found_by)
            if by_bm25:
                board.add_reranked(by_bm25, state=state, index="bm25")
    start = "zero_shot" if run.config.retriever.epochs == 0 else "retriever"
    pairs = [
        (("joint", "retriever", first), ("zero_shot", "retriever", first)),
        (("joint", "retriever", first), (start, "retriever", first)),
        (("joint", "reranker", first), ("reranker", "reranker", first)),
        (("joint", "reranker", first), ("joint", "retriever", first)),
    ]
    return board.write(split, pairs, first)


def evaluate_candidates(
    run: Run,
    store: tokens.Store,
    split: str,
    path: pathlib.Path,
    name: str,
    states: tuple[str, ...] = RERANKED,
) -> dict:
    """Evaluates re-ranking of candidates that another system found, the same for every state.

    Differences between states are then due to the re-ranker alone, while in `evaluate` they are also
    due to the retriever that finds its candidates. Writes the same files as `evaluate`, with `name`
    for the index and `<split>.<name>` for the split. Queries of the split that the run file at `path`
    does not name have no candidates and count 0.
    """
    board = Scoreboard(run, store, split)
    where = board.store, split, board.rows_Q, board.reranked_R
    ranking, named = rankings.read_candidates(path, *where)
    asked = tuple(array[board.reranked_R] for array in ranking)
    given, joint = ("candidates", "given", name), ("joint", "reranker", name)
    board.add(given, board.rows_Q[board.reranked_R], asked, queries_named=named)
    for state in states:
        board.add_reranked(ranking, state=state, index=name)
    pairs = [(joint, ("reranker", "reranker", name)), (joint, given)]
    return board.write(f"{split}.{name}", pairs, name)
