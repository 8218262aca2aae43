"""What the models are worth: on dev during training, on a split in full after it."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts, metrics, mining
from rqv2_jax.data import answers as answers_lib
from rqv2_jax.data import collection, own_texts, tokens, topics
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.errors import InputError
from rqv2_jax.retrieval import encode, index, rerank
from rqv2_jax.workdir import Run, texts_of

STATES = ("zero_shot", "retriever", "reranker", "joint")
# The re-ranker is trained from reranker on.
RERANKED = ("reranker", "joint")
DEV_METRIC = "RR@10"


def _qrels_of(queries: tokens.Queries, rows_Q: np.ndarray):
    """Labels of some queries, given in ascending order; query rows count through these alone."""
    query_N, passage_N, relevance_N = queries.qrels_3xN
    chosen_N = np.isin(query_N, rows_Q)
    return np.searchsorted(rows_Q, query_N[chosen_N]), passage_N[chosen_N], relevance_N[chosen_N]


class Dev:
    """Measures both models on dev queries during training, on a fixed pool of passages.

    The retriever ranks a pool: the positives of the dev queries, their candidates if there are any,
    and random passages up to `config.dev.pool`. The re-ranker re-ranks each query's candidates.
    """

    def __init__(self, run: Run, store: tokens.Store, candidates: lists_lib.Candidates | None):
        self.run, self.store, self.candidates = run, store, candidates
        self.queries = store.splits["dev"]
        if candidates is None:
            rows_Q = lists_lib.subset(
                len(self.queries.ids), run.config.dev.queries, run.config.seed
            )
        else:
            rows_Q = candidates.query_rows_Q
        self.rows_Q = np.sort(rows_Q)
        self.qrels = _qrels_of(self.queries, self.rows_Q)
        pool = self.qrels[1][self.qrels[2] > 0]
        if candidates is not None:
            pool = np.append(pool, candidates.passages_QxN.reshape(-1))
        pool = np.unique(pool)
        others = np.setdiff1d(np.arange(len(store.passage_ids)), pool)
        others = np.random.default_rng(run.config.seed).permutation(others)
        fill = max(run.config.dev.pool - len(pool), 0)
        self.pool_N = np.sort(np.append(pool, others[:fill]))

    def _score(self, passages_QxK, scores_QxK) -> float:
        if np.isnan(scores_QxK).any():
            # The loop stops at it, and knows the stage and the step.
            return np.nan
        values = metrics.evaluate(
            passages_QxK, scores_QxK, self.store.passage_ids, self.qrels, [DEV_METRIC]
        )
        return float(values[DEV_METRIC].mean())

    def retriever(self, params) -> float:
        """RR@10 of the retriever over the pool."""
        forward = self.run.forward
        passages_NxD = encode.passages(forward, params["passage"], self.store, self.pool_N)
        queries_QxD = encode.queries(forward, params["query"], self.queries.texts, self.rows_Q)
        own_Q = own_texts.of_rows(self.queries, self.rows_Q)
        depth = own_texts.deeper(10, own_Q)
        rows_QxK, scores_QxK = index.exact(queries_QxD, [passages_NxD], depth)
        return self._score(*own_texts.without(self.pool_N[rows_QxK], scores_QxK, own_Q))

    def reranker(self, params) -> float:
        """RR@10 of the re-ranker over each query's candidates."""
        order_Q = np.argsort(self.candidates.query_rows_Q)
        passages_QxK = self.candidates.passages_QxN[order_Q]
        scores_QxK = rerank.scores(
            self.run.forward, params, self.store, self.queries.texts, self.rows_Q, passages_QxK
        )
        return self._score(passages_QxK, scores_QxK)


def with_topics(
    run: Run, store: tokens.Store, topics_file: pathlib.Path, qrels_file: pathlib.Path
) -> tuple[tokens.Store, str]:
    """The store with one split more, and its name: queries and labels of files over its passages.

    The split is named after the topics file. Its queries are those with a relevant passage.

    Raises:
      InputError: a file cannot be used, or the labels name what the corpus or the topics lack.
    """
    name = stem(topics_file)
    if name in store.splits:
        raise InputError(
            f"{topics_file}: the run has a split {name!r} of its own, and results are named after the "
            "file; rename it"
        )
    qrels = list(collection.labels(collection.open_file(qrels_file)))
    judged = {label.query_id for label in qrels if label.relevance > 0}
    given, left = list(topics.topics(topics_file)), collection.Left()
    queries = [query for query in topics.asked(given, left) if query.id in judged]
    ids = [query.id for query in queries]
    query_rows, passage_rows = (
        {key: row for row, key in enumerate(each)} for each in (ids, store.passage_ids)
    )
    query_rows = {query.id: -1 for query in given if not query.text.strip()} | query_rows
    found = collection.check_qrels(qrels, query_rows, passage_rows, left)
    qrels_3xN = np.stack(found).astype(np.int64)
    for line in left.lines():
        tqdm.tqdm.write(f"  {name}: {line}")
    if not ids:
        raise InputError(f"{qrels_file}: no relevance is above 0; give labels of {topics_file}")
    texts = run.tokenizer.texts([query.text for query in queries])
    fingerprint = collection.content_hash([topics_file, qrels_file])
    further = tokens.Queries(texts, ids, qrels_3xN, fingerprint)
    further = own_texts.of_queries(store, further, run.config.data.ignore_identical_ids)
    return dataclasses.replace(store, splits={**store.splits, name: further}), name


def stem(file: pathlib.Path) -> str:
    """The name of a file of topics or candidates without its ending; results are named after it."""
    return re.sub(r"(\.tsv|\.txt|\.jsonl|\.trec|\.run)?(\.gz)?$", "", file.name)


def _asked(settings, queries: tokens.Queries) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the queries that are measured [Q], and which of these are re-ranked [R].

    The same for every seed, so that runs can be compared by query.
    """
    rows_Q = np.sort(lists_lib.subset(len(queries.ids), settings.queries, 0))
    return rows_Q, np.sort(lists_lib.subset(len(rows_Q), settings.rerank_queries, 0))


class _Report:
    """What models find for queries of a split: run files, and metrics in the mean and by query."""

    def __init__(self, run: Run, store: tokens.Store, split: str):
        if split not in store.splits:
            raise InputError(f"--split {split}: the data has only {', '.join(store.splits)}")
        self.run, self.store, self.split = run, store, split
        self.queries = store.splits[split]
        settings = run.config.evaluate
        self.rows_Q, self.reranked_R = _asked(settings, self.queries)
        self._measured = _measure(run, store, split)
        self.rows, self.values, self.asked = [], {}, {}
        hosts.from_first(lambda: (run.workdir / "runs").mkdir(exist_ok=True))

    def add(self, state, model, name, rows_Q, passages_QxK, scores_QxK, **extra):
        """Measures what a model found, or re-ranked, for the queries in these rows of the split."""
        path = self.run.workdir / "runs" / f"{self.split}.{state}.{model}.{name}.trec"
        tag = f"rqv2_jax.{state}.{model}"
        found, query_ids = (passages_QxK, scores_QxK), [self.queries.ids[row] for row in rows_Q]
        hosts.from_first(
            lambda: metrics.write_trec_run(path, query_ids, self.store.passage_ids, *found, tag)
        )
        values = self._measured(rows_Q, *found)
        self.values[state, model, name], self.asked[state, model, name] = values, rows_Q
        row = {"state": state, "model": model, "split": self.split, "index": name}
        means = {metric: float(value.mean()) for metric, value in values.items()}
        self.rows.append({**row, "queries": len(query_ids), "metrics": means, **extra})

    def add_reranked(self, state, name, passages_RxK, scores_RxK):
        """Adds what the re-ranker of a state makes of the first candidates of the re-ranked queries."""
        run, settings = self.run, self.run.config.evaluate
        rows_R = self.rows_Q[self.reranked_R]
        top_RxK = passages_RxK[:, : settings.rerank_depth]

        def compute():
            params, texts = run.params(state, "reranker"), self.queries.texts
            found = rerank.scores(run.forward, params, self.store, texts, rows_R, top_RxK)
            return {"scores": found}

        path = run.workdir / "eval" / f"{self.split}.{state}.reranked.{name}.npz"
        source = (
            f"{run.origin(state, 'reranker')} {self.store.fingerprint} {self.queries.fingerprint}"
        )
        source = artifacts.digest(source, rows_R, top_RxK)
        top = artifacts.cached(path, source, compute)["scores"]
        merged_RxK = rerank.merge(top, scores_RxK)
        self.add(state, "reranker", name, rows_R, passages_RxK, merged_RxK)

    def write(self, name: str, pairs) -> dict:
        """Compares pairs of (state, model, index) that were added; writes `eval/<name>.*`."""
        run, settings = self.run, self.run.config.evaluate
        compared = metrics.at_relevance(settings.metrics, settings.min_relevance)[0]
        significance = []
        for pair in dict.fromkeys(pairs):
            if not set(pair) <= set(self.values):
                continue
            common = np.intersect1d(*(self.asked[key] for key in pair))
            values = [self.values[key][compared][np.isin(self.asked[key], common)] for key in pair]
            difference, p_value = metrics.paired_test(
                *values, permutations=settings.permutations, seed=run.config.seed
            )
            names = {side: " ".join(key[:2]) for side, key in zip("ab", pair)}
            test = {"metric": compared, "difference": difference, "p_value": p_value}
            significance.append(names | test)
        titles = run.config.data.titles and len(self.store.titles.tokens) > 0
        report = {"rows": self.rows, "significance": significance, "titles": titles}
        arrays = {
            f"{'.'.join(key)}.{m}": v
            for key, found in self.values.items()
            for m, v in found.items()
        }
        folder = run.workdir / "eval"
        artifacts.write_arrays(folder / f"{name}.per_query.npz", arrays)
        artifacts.write_text(folder / f"{name}.json", json.dumps(report, indent=1) + "\n")
        return report


def evaluate(
    run: Run, store: tokens.Store, split: str, indexes: tuple[str, ...], states=STATES
) -> dict:
    """Retrieval and re-ranking of model states on a split, as `results.json` describes it.

    Retrieves with exact search and, if asked for, with ScaNN; the re-ranker re-ranks what its own
    state's retriever found by the first of `indexes`, for all queries or the same subset of them in
    every state. Writes `runs/*.trec`, `eval/<split>.json` and, as `<state>.<model>.<index>.<metric>`,
    the value of each query the model was measured on, in their order, in `eval/<split>.per_query.npz`.

    Raises:
      InputError: the split is not there, or a stage has not been run.
    """
    report, first = _Report(run, store, split), indexes[0]
    for state in states:
        if state == "retriever" and run.config.retriever.epochs == 0:
            continue
        retrieved = {}
        for name in indexes:
            found, extra = _search(run, store, split, report.rows_Q, state, name)
            retrieved[name] = found["passages"], found["scores"]
            # The re-ranker's warm-up leaves the retriever as it was.
            if state != "reranker":
                report.add(state, "retriever", name, report.rows_Q, *retrieved[name], **extra)
        if state in RERANKED:
            found = (array[report.reranked_R] for array in retrieved[first])
            report.add_reranked(state, first, *found)
    start = "zero_shot" if run.config.retriever.epochs == 0 else "retriever"
    pairs = [
        (("joint", "retriever", first), ("zero_shot", "retriever", first)),
        (("joint", "retriever", first), (start, "retriever", first)),
        (("joint", "reranker", first), ("reranker", "reranker", first)),
        (("joint", "reranker", first), ("joint", "retriever", first)),
    ]
    return report.write(split, pairs)


def evaluate_candidates(
    run: Run, store: tokens.Store, split: str, path: pathlib.Path, name: str, states=RERANKED
) -> dict:
    """Re-ranking of candidates that another system found, the same for every state.

    What differs between states is then the re-ranker's own doing, whoever finds its candidates in
    `evaluate`. Writes as that does, with `name` for the index and `<split>.<name>` for the split.

    Args:
      path: run file, as `metrics.read_trec_run` reads it; queries of the split that it does not name
        have no candidates and count 0.

    Raises:
      InputError: the file cannot be used, or a stage has not been run.
    """
    report, found = _Report(run, store, split), metrics.read_trec_run(path)
    passage_rows = {passage: row for row, passage in enumerate(store.passage_ids)}
    rows_R = report.rows_Q[report.reranked_R]
    query_ids = [report.queries.ids[row] for row in rows_R]
    named = len(found.keys() & set(query_ids))
    if not named:
        raise InputError(
            f"{path}: holds none of the {len(query_ids)} {split} queries of {run.workdir} that are "
            "re-ranked; give a run of these"
        )
    for query in query_ids:
        for passage, _ in found.get(query, ()):
            if passage not in passage_rows:
                raise InputError(
                    f"{path}: passage {passage!r} of query {query!r} is not in the collection; give "
                    "a run over its passages"
                )
    passages_RxK, scores_RxK = metrics.run_arrays(found, query_ids, passage_rows)
    own_R = own_texts.of_rows(report.queries, rows_R)
    passages_RxK = np.where(passages_RxK == own_R[:, None], -1, passages_RxK)
    passages_RxK, scores_RxK = metrics.sort_run(passages_RxK, scores_RxK, store.passage_ids)
    scores_RxK = np.where(passages_RxK < 0, 0, scores_RxK)
    given = passages_RxK, scores_RxK
    report.add("candidates", "given", name, rows_R, *given, queries_named=named)
    for state in states:
        report.add_reranked(state, name, *given)
    joint = ("joint", "reranker", name)
    pairs = [(joint, ("reranker", "reranker", name)), (joint, ("candidates", "given", name))]
    return report.write(f"{split}.{name}", pairs)


def check_metrics(run: Run, store: tokens.Store, split: str):
    """Raises InputError unless the labels of a split can give the metrics of the config."""
    settings, queries = run.config.evaluate, store.splits[split]
    names = metrics.at_relevance(settings.metrics, settings.min_relevance)
    relevance_N = None
    if queries.qrels_3xN.size:
        rows_Q, reranked_R = _asked(settings, queries)
        *_, relevance_N = _qrels_of(queries, rows_Q[reranked_R])
    metrics.check_measurable(names, relevance_N)


def _measure(run: Run, store: tokens.Store, split: str):
    """`measure(rows_Q, passages_QxK, scores_QxK)`: every metric's values for queries of a split."""
    settings, queries = run.config.evaluate, store.splits[split]
    names = metrics.at_relevance(settings.metrics, settings.min_relevance)
    if queries.qrels_3xN.size:

        def labelled(rows_Q, *found):
            qrels = _qrels_of(queries, rows_Q)
            return metrics.evaluate(*found, store.passage_ids, qrels, names)

        return labelled

    texts = texts_of(run, store)
    answers = [query.answers for query in texts.queries(split)]
    deepest = max(metrics.parse_metric(name)[1] for name in names)
    passages: dict[int, str] = {}

    def measure(rows_Q, passages_QxK, scores_QxK):
        found = metrics.sort_run(passages_QxK, scores_QxK, store.passage_ids)
        top_QxK, scores_QxK = (array[:, :deepest] for array in found)
        wanted = set(top_QxK[top_QxK >= 0].tolist()) - passages.keys()
        if wanted:
            for row, passage in enumerate(texts.passages()):
                if row in wanted:
                    passages[row] = answers_lib.joined(passage.text)
        qrels = answers_lib.judge(top_QxK, [answers[row] for row in rows_Q], passages)
        every_Q = np.arange(len(rows_Q))
        return metrics.evaluate(top_QxK, scores_QxK, store.passage_ids, qrels, names, every_Q)

    return measure


def retrieve(
    run: Run,
    store: tokens.Store,
    texts: tokens.Texts,
    rows_Q: np.ndarray,
    state: str,
    name: str,
    own_Q: np.ndarray,
) -> tuple[np.ndarray, np.ndarray] | None:
    """What the retriever of a state finds for some of the queries by the index "exact" or "scann".

    Without the passages of `own_Q`, one for each query, or -1.

    Returns:
      (passage rows [Q, K], scores [Q, K]), best first, K = `config.evaluate.retrieve_depth`; with
      ScaNN, which searches on the first of several hosts, None on the others.
    """
    settings, stage = run.config.evaluate, run.trained_by(state, "retriever")
    shards = mining.corpus_vectors(run, store, state)
    depth = own_texts.deeper(settings.retrieve_depth, own_Q)
    # All hosts have to ask for this, though the first alone may use it.
    source = f"{run.origin(state, 'retriever')} {store.fingerprint}"
    tower = run.params(state, "retriever")["query"]
    vectors_QxD = encode.queries(run.forward, tower, texts, rows_Q)
    if name == "exact":
        found = index.exact(vectors_QxD, shards, depth)
    elif hosts.first():
        folder = run.workdir / "index" / stage
        searcher = index.build_scann(shards, settings.scann, depth, folder, source)
        found = index.scann_search(searcher, vectors_QxD, depth)
    else:
        return None
    # By the tie rule, so that the re-ranker's cut does not depend on the order of the corpus.
    return own_texts.without(*metrics.sort_run(*found, store.passage_ids), own_Q)


def _search(run: Run, store: tokens.Store, split: str, rows_Q: np.ndarray, state: str, name: str):
    """What the retriever of a state finds for queries of a split, and what to say of the index."""
    settings, queries = run.config.evaluate, store.splits[split]
    stage = run.trained_by(state, "retriever")
    source = f"{run.origin(state, 'retriever')} {store.fingerprint} {queries.fingerprint} "
    source += f"{settings.queries} {settings.retrieve_depth}"

    def cached(index_name, source):
        def compute():
            own_Q = own_texts.of_rows(queries, rows_Q)
            found = retrieve(run, store, queries.texts, rows_Q, state, index_name, own_Q)
            return {} if found is None else dict(zip(("passages", "scores"), found))

        path = run.workdir / "eval" / f"{split}.{stage}.{index_name}.npz"
        return artifacts.cached(path, source, compute)

    found = cached("exact", source)
    if name == "exact":
        return found, {}
    built_by = json.dumps(settings.scann.to_dict(), sort_keys=True)
    approximate = cached("scann", f"{source} {built_by}")
    recalls = {
        f"recall@{depth} against exact": index.recall(
            approximate["passages"][:, :depth], found["passages"][:, :depth]
        )
        for depth in (10, 100)
    }
    return approximate, recalls


def render(report: dict) -> str:
    """The report as a table for people."""
    names = list(report["rows"][0]["metrics"])
    width = max(11, *map(len, names))
    longest = max(6, *(len(row["index"]) for row in report["rows"]))
    head = f"{'state':10} {'model':10} {'index':{longest}} "
    head += " ".join(f"{n:>{width}}" for n in names)
    lines = [head, "-" * len(head)]
    for row in report["rows"]:
        cells = " ".join(f"{row['metrics'][n]:{width}.4f}" for n in names)
        recalls = [f"{k} {v:.3f}" for k, v in row.items() if k.startswith("recall@")]
        note = f"  {', '.join(recalls)}" if recalls else ""
        which = f"{row['state']:10} {row['model']:10} {row['index']:{longest}}"
        lines.append(f"{which} {cells}{note}")
    fewest, most = (f(row["queries"] for row in report["rows"]) for f in (min, max))
    counted = f"{most} {report['rows'][0]['split']} queries"
    if fewest < most:
        counted += f", {fewest} of them re-ranked"
    for row in report["rows"]:
        if row.get("queries_named", most) < most:
            counted += f", {row['queries_named']} of them with candidates (the others count 0)"
    titles = "with" if report["titles"] else "without"
    lines.append(f"{counted}; passages {titles} titles")
    lines += [
        f"{s['metric']}: {s['a']} - {s['b']} = {s['difference']:+.4f} (p = {s['p_value']:.4f})"
        for s in report["significance"]
    ]
    return "\n".join(lines)
