"""What the models are worth: on dev during training, on a split in full after it."""

import dataclasses
import functools
import json
import pathlib
import re

import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts, optional
from rqv2_jax.data import collection, files, own_texts, tokens
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data.readers import topics
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import answers as answers_lib
from rqv2_jax.ranking import metrics, significance, trec
from rqv2_jax.recipe import mining, results
from rqv2_jax.recipe.workdir import Run, as_released, texts_of
from rqv2_jax.retrieval import bm25, encode, index, rerank

STATES = ("zero_shot", "retriever", "reranker", "joint")
# States that are not trained and that training has to beat.
FLOORS = ("bm25", "released")
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
    qrels = list(files.labels(files.open_file(qrels_file)))
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
    strings = tuple(query.text for query in queries)
    texts = run.tokenizer.texts(list(strings))
    fingerprint = files.content_hash([topics_file, qrels_file])
    further = tokens.Queries(texts, ids, qrels_3xN, fingerprint, strings=strings)
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
        self.rows, self.values, self.asked, self.reachable = {}, {}, {}, {}
        hosts.from_first(lambda: (run.workdir / "runs").mkdir(exist_ok=True))

    def add(self, state, model, name, rows_Q, passages_QxK, scores_QxK, **extra):
        """Measures what a model found, or re-ranked, for the queries in these rows of the split."""
        path = self.run.workdir / "runs" / f"{self.split}.{state}.{model}.{name}.trec"
        tag = f"rqv2_jax.{state}.{model}"
        found, query_ids = (passages_QxK, scores_QxK), [self.queries.ids[row] for row in rows_Q]
        hosts.from_first(
            lambda: trec.write_run(path, query_ids, self.store.passage_ids, *found, tag)
        )
        key = state, model, name
        self.values[key], self.asked[key] = self._measured(rows_Q, *found), rows_Q
        self.rows[key] = extra

    def add_reranked(self, state, name, passages_QxK, scores_QxK):
        """Adds what the re-ranker of a state makes of the first candidates of the re-ranked queries.

        Args:
          passages_QxK: candidates of all queries that are measured, best first, or -1.
          scores_QxK: their scores by what found them.
        """
        run, settings = self.run, self.run.config.evaluate
        rows_R, depth = self.rows_Q[self.reranked_R], settings.rerank_depth
        passages_RxK, scores_RxK = passages_QxK[self.reranked_R], scores_QxK[self.reranked_R]
        scores_RxK = np.where(passages_RxK < 0, 0, scores_RxK)
        top_RxK = passages_RxK[:, :depth]

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
        (reached,) = metrics.at_relevance((f"Success@{depth}",), settings.min_relevance)
        (values_R,) = self._measured(
            rows_R, top_RxK, scores_RxK[:, :depth], names=(reached,)
        ).values()
        self.reachable[name] = float(values_R.mean())

    def _described(self) -> list[dict]:
        """The rows of the table, all over the queries that every one of them was measured on."""
        rows, shared = [], functools.reduce(np.intersect1d, self.asked.values())
        for (state, model, name), extra in self.rows.items():
            asked, values = (x[state, model, name] for x in (self.asked, self.values))
            among = np.isin(asked, shared)
            row = {"state": state, "model": model, "split": self.split, "index": name}
            row |= {"queries": len(shared)}
            row |= {"metrics": {m: float(v[among].mean()) for m, v in values.items()}} | extra
            if len(asked) > len(shared):
                every = {m: float(v.mean()) for m, v in values.items()}
                row["all_queries"] = {"queries": len(asked), "metrics": every}
            rows.append(row)
        return rows

    def _compare(self, a, b) -> dict:
        """The significance test of two keys of `values`, over the queries that both have."""
        settings = self.run.config.evaluate
        metric = metrics.at_relevance(settings.metrics, settings.min_relevance)[0]
        common = np.intersect1d(self.asked[a], self.asked[b])
        values = (self.values[key][metric][np.isin(self.asked[key], common)] for key in (a, b))
        difference, p_value = significance.paired_test(
            *values, permutations=settings.permutations, seed=self.run.config.seed
        )
        names = {"a": results.name(*a), "b": results.name(*b), "metric": metric}
        return {**names, "queries": len(common), "difference": difference, "p_value": p_value}

    def _against_floors(self, first: str) -> list[tuple]:
        """Pairs of what a trained state finds, or re-ranks, and what it has to beat."""
        trained, floors = set(STATES) - {"zero_shot"}, set(FLOORS)
        keys = [key for key in self.values if key[2] in (first, "bm25") or key[0] in floors]
        return [(a, b) for a in keys for b in keys if a[0] in trained and b[0] in floors]

    def write(self, name: str, pairs, first: str) -> dict:
        """Compares pairs of (state, model, index) that were added; writes `eval/<name>.*`.

        Adds the pairs of what the index `first` finds and the floors, and the verdict of the last
        state.
        """
        run, beaten = self.run, self._against_floors(first)
        pairs = [pair for pair in (*pairs, *beaten) if set(pair) <= set(self.values)]
        tests = {pair: self._compare(*pair) for pair in dict.fromkeys(pairs)}
        last = max((a[0] for a, _ in beaten), key=STATES.index, default=None)
        verdict = [(pair[0], tests[pair]) for pair in beaten if pair[0][0] == last]
        report = {
            "rows": self._described(),
            "significance": list(tests.values()),
            "verdict": results.verdict([test for _, test in verdict]),
            "titles": run.config.data.titles and len(self.store.titles.tokens) > 0,
        }
        worse = {key for key, test in verdict if results.told(test) == "worse than"}
        if worse:
            report["verdict"] += results.advice(run, self.store, worse, self.reachable)
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
    """Retrieval and re-ranking of floors and model states on a split, as `results.json` has it.

    The floors are BM25 and the starting retriever as its folder has it (state "released"). Retrieves
    with exact search and, if asked for, with ScaNN; the re-ranker re-ranks what its own state's
    retriever found by the first of `indexes`, and what BM25 found (index "bm25"). Where not all
    queries are re-ranked, `evaluate.rerank_queries` of them are, one random sample with a fixed seed:
    the `metrics` of every row are over that sample, and `all_queries` has those of rows that were
    measured on more. A significance test takes all queries that both sides were measured on.

    Writes `runs/*.trec`, `eval/<split>.json` and, as `<state>.<model>.<index>.<metric>`, the value of
    each query the model was measured on, in their order, in `eval/<split>.per_query.npz`.

    Raises:
      InputError: the split is not there, or a stage has not been run.
    """
    report, first = _Report(run, store, split), indexes[0]
    floor = _bm25(run, store, split, report.rows_Q)
    if floor:
        described = bm25.described(run.config.evaluate.bm25)
        report.add("bm25", "bm25", "bm25", report.rows_Q, *floor, parameters=described)
    released = _released(run, store, split, report.rows_Q)
    if released:
        report.add("released", "retriever", "exact", report.rows_Q, *released)
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
            report.add_reranked(state, first, *retrieved[first])
            if floor:
                report.add_reranked(state, "bm25", *floor)
    start = "zero_shot" if run.config.retriever.epochs == 0 else "retriever"
    pairs = [
        (("joint", "retriever", first), ("zero_shot", "retriever", first)),
        (("joint", "retriever", first), (start, "retriever", first)),
        (("joint", "reranker", first), ("reranker", "reranker", first)),
        (("joint", "reranker", first), ("joint", "retriever", first)),
    ]
    return report.write(split, pairs, first)


def evaluate_candidates(
    run: Run, store: tokens.Store, split: str, path: pathlib.Path, name: str, states=RERANKED
) -> dict:
    """Re-ranking of candidates that another system found, the same for every state.

    What differs between states is then the re-ranker's own doing, whoever finds its candidates in
    `evaluate`. Writes as that does, with `name` for the index and `<split>.<name>` for the split.

    Args:
      path: run file, as `trec.read_run` reads it; queries of the split that it does not name
        have no candidates and count 0.

    Raises:
      InputError: the file cannot be used, or a stage has not been run.
    """
    report, found = _Report(run, store, split), trec.read_run(path)
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
    found = {query: found[query] for query in query_ids if query in found}
    every_id = [report.queries.ids[row] for row in report.rows_Q]
    passages_QxK, scores_QxK = trec.run_arrays(found, every_id, passage_rows)
    own_Q = own_texts.of_rows(report.queries, report.rows_Q)
    passages_QxK = np.where(passages_QxK == own_Q[:, None], -1, passages_QxK)
    given = metrics.sort_run(passages_QxK, scores_QxK, store.passage_ids)
    asked = (array[report.reranked_R] for array in given)
    report.add("candidates", "given", name, rows_R, *asked, queries_named=named)
    for state in states:
        report.add_reranked(state, name, *given)
    joint = ("joint", "reranker", name)
    pairs = [(joint, ("reranker", "reranker", name)), (joint, ("candidates", "given", name))]
    return report.write(f"{split}.{name}", pairs, name)


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
    """`measure(rows_Q, passages_QxK, scores_QxK)`: every metric's values for queries of a split.

    Or those of other metrics, given as `names`.
    """
    settings, queries = run.config.evaluate, store.splits[split]
    wanted = metrics.at_relevance(settings.metrics, settings.min_relevance)
    if queries.qrels_3xN.size:

        def labelled(rows_Q, *found, names=wanted):
            qrels = _qrels_of(queries, rows_Q)
            return metrics.evaluate(*found, store.passage_ids, qrels, names)

        return labelled

    texts = texts_of(run, store)
    answers = [query.answers for query in texts.queries(split)]
    passages: dict[int, str] = {}

    def measure(rows_Q, passages_QxK, scores_QxK, names=wanted):
        deepest = max(metrics.parse_metric(name)[1] for name in names)
        found = metrics.sort_run(passages_QxK, scores_QxK, store.passage_ids)
        top_QxK, scores_QxK = (array[:, :deepest] for array in found)
        unread = set(top_QxK[top_QxK >= 0].tolist()) - passages.keys()
        if unread:
            for row, passage in enumerate(texts.passages()):
                if row in unread:
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


def _left_out(name: str, run: Run, store: tokens.Store) -> bool:
    """Says whether a floor is left out, in a line too, because there are too many passages."""
    passages, most = len(store.passage_ids), run.config.evaluate[name].most_passages
    if passages > most:
        tqdm.tqdm.write(
            f"  {name}: left out, as {passages} passages are more than "
            f"config.evaluate.{name}.most_passages, {most}"
        )
    return passages > most


def _released(run: Run, store: tokens.Store, split: str, rows_Q: np.ndarray):
    """What the starting retriever finds for queries of a split at its own length and similarity.

    As `retrieve` gives it, by exact search; None where it is left out.
    """
    if _left_out("released", run, store):
        return None
    try:
        own = as_released(run)
    except InputError as e:
        tqdm.tqdm.write(f"  released: left out, as the folder cannot be read as it is ({e})")
        return None
    queries, settings = store.splits[split], run.config.evaluate

    def reading(x):
        # What the retriever alone reads.
        inputs = dataclasses.replace(x.inputs, pair_length=0, pair_cls=0, pair_sep=0)
        return inputs, x.models.retriever, x.models.pooling, x.models.similarity

    if reading(own) == reading(run):
        found, _ = _search(run, store, split, rows_Q, "zero_shot", "exact")
        return found["passages"], found["scores"]
    own_Q = own_texts.of_rows(queries, rows_Q)
    source = f"released {run.weights_hash} {store.fingerprint} {reading(own)} "

    def compute():
        tqdm.tqdm.write(f"  released: the starting model at {own.inputs.passage_length} tokens")
        towers = own.initial("retriever")
        folder = run.workdir / "vectors" / "released"
        shards = encode.corpus(own.forward, towers["passage"], store, folder, source)
        vectors_QxD = encode.queries(own.forward, towers["query"], queries.texts, rows_Q)
        depth = own_texts.deeper(settings.retrieve_depth, own_Q)
        found = metrics.sort_run(*index.exact(vectors_QxD, shards, depth), store.passage_ids)
        return dict(zip(("passages", "scores"), own_texts.without(*found, own_Q)))

    asked = f"{source} {queries.fingerprint} {settings.retrieve_depth}"
    path = run.workdir / "eval" / f"{split}.released.npz"
    found = artifacts.cached(path, artifacts.digest(asked, rows_Q, own_Q), compute)
    return found["passages"], found["scores"]


def _bm25(run: Run, store: tokens.Store, split: str, rows_Q: np.ndarray):
    """What BM25 finds for queries of a split, as `retrieve` gives it; None where it is left out.

    A line says so then.
    """
    settings, queries = run.config.evaluate, store.splits[split]
    if _left_out("bm25", run, store):
        return None
    try:
        for package in bm25.PACKAGES:
            optional.load(package, "the floor BM25")
    except InputError as e:
        tqdm.tqdm.write(f"  bm25: left out ({e})")
        return None

    def compute():
        if not hosts.first():
            return {}
        try:
            texts = texts_of(run, store)
        except InputError as e:
            tqdm.tqdm.write(f"  bm25: left out, as the texts cannot be read ({e})")
            return {}
        strings = queries.strings or tuple(query.text for query in texts.queries(split))
        titles = run.config.data.titles
        read = (f"{p.title} {p.text}" if titles else p.text for p in texts.passages())
        asked = [strings[row] for row in rows_Q]
        depth = own_texts.deeper(settings.retrieve_depth, own_Q)
        found = bm25.search(read, asked, depth, settings.bm25)
        found = own_texts.without(*found, own_Q)
        if (found[0] < 0).all():
            tqdm.tqdm.write(
                "  bm25: left out, as no query has a word of a passage; words are runs of two letters "
                "or more, which does not do for languages written without spaces"
            )
            return {}
        return dict(zip(("passages", "scores"), metrics.sort_run(*found, store.passage_ids)))

    own_Q = own_texts.of_rows(queries, rows_Q)
    method = json.dumps(bm25.described(settings.bm25), sort_keys=True)
    source = f"{store.fingerprint} {queries.fingerprint} {method} {run.config.data.titles} "
    source = artifacts.digest(source + str(settings.retrieve_depth), rows_Q, own_Q)
    found = artifacts.cached(run.workdir / "eval" / f"{split}.bm25.npz", source, compute)
    return (found["passages"], found["scores"]) if found else None
