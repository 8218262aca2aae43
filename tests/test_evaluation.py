"""Results of a finished run: rows, comparisons, samples of queries, judging by answers."""

import json
import pathlib
import re
import shutil

import ir_measures
import numpy as np
import pytest
from tiny_run import tiny_config

from rqv2_jax import config as config_lib
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import tokens
from rqv2_jax.errors import InputError
from rqv2_jax.models.scoring import tower
from rqv2_jax.recipe import evaluation, mining, pipeline, results
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.recipe.run import open_run
from rqv2_jax.recipe.stage import Dev, stage_batches
from rqv2_jax.retrieval import encode
from rqv2_jax.training import stages


def test_results_have_a_row_for_every_state_model_and_index(finished):
    _, workdir = finished
    report = json.loads((workdir / "results.json").read_text())
    rows = [(row["state"], row["model"], row["index"]) for row in report["rows"]]
    assert rows == [
        ("bm25", "bm25", "bm25"),
        ("zero_shot", "retriever", "exact"),
        ("zero_shot", "retriever", "scann"),
        ("retriever", "retriever", "exact"),
        ("retriever", "retriever", "scann"),
        ("reranker", "reranker", "exact"),
        ("reranker", "reranker", "bm25"),
        ("joint", "retriever", "exact"),
        ("joint", "retriever", "scann"),
        ("joint", "reranker", "exact"),
        ("joint", "reranker", "bm25"),
    ]
    assert all(row["queries"] == 8 and row["split"] == "test" for row in report["rows"])
    parameters = {"variant": "lucene", "k1": 1.2, "b": 0.75, "stemmer": "english"}
    assert report["rows"][0]["parameters"] == {**parameters, "library": "bm25s 0.3.16"}
    compared = [(s["a"], s["b"]) for s in report["significance"]]
    assert compared == [
        ("joint retriever", "zero_shot retriever"),
        ("joint retriever", "retriever retriever"),
        ("joint reranker", "reranker reranker"),
        ("joint reranker", "joint retriever"),
        ("retriever retriever", "bm25"),
        ("reranker reranker", "bm25"),
        ("reranker reranker on bm25", "bm25"),
        ("joint retriever", "bm25"),
        ("joint reranker", "bm25"),
        ("joint reranker on bm25", "bm25"),
    ]


def test_every_difference_is_that_of_the_values_by_query(finished):
    _, workdir = finished
    report = json.loads((workdir / "results.json").read_text())
    with np.load(workdir / "eval" / "test.per_query.npz") as file:
        values = dict(file)
    keys = {
        results.name(row["state"], row["model"], row["index"]): row
        for row in report["rows"]
        if row["index"] != "scann"
    }
    for test in report["significance"]:
        a, b = (values["{state}.{model}.{index}.RR@10".format(**keys[test[side]])] for side in "ab")
        assert test["difference"] == pytest.approx((a - b).mean(), abs=1e-12)
        assert test["queries"] == len(a) == 8


def test_the_verdict_speaks_of_both_models_after_joint_training(finished):
    _, workdir = finished
    report = json.loads((workdir / "results.json").read_text())
    subjects = ("joint retriever", "joint reranker", "joint reranker on bm25")
    tests = {test["a"]: test for test in report["significance"] if test["b"] == "bm25"}
    for subject, said in zip(subjects, report["verdict"]):
        test = tests[subject]
        if test["p_value"] >= 0.05:
            expected = "not told apart from"
        else:
            expected = "better than" if test["difference"] > 0 else "worse than"
        assert said.startswith(f"{subject} is {expected} bm25: RR@10 {test['difference']:+.4f} (p")
    advice = report["verdict"][3:]
    assert all(line.startswith("look at: ") for line in advice)
    assert bool(advice) == any(" worse than " in said for said in report["verdict"][:3])
    shown = results.render(report)
    for said in report["verdict"]:
        assert " ".join(said.split()) in " ".join(shown.split())


def test_the_table_fits_into_100_columns(finished):
    _, workdir = finished
    shown = results.render(json.loads((workdir / "results.json").read_text()))
    assert max(map(len, shown.splitlines())) <= 100
    head, _, bm25_row = shown.splitlines()[:3]
    assert head.split() == ["state", "model", "index", *config_lib.default().evaluate.metrics]
    assert bm25_row.split()[:3] == ["bm25", "bm25", "bm25"]


def test_results_agree_with_ir_measures_on_the_run_files(finished):
    _, workdir = finished
    report = json.loads((workdir / "results.json").read_text())
    qrels = [ir_measures.Qrel(f"q{i}", f"p{i}", 1) for i in range(40, 48)]
    for row in report["rows"]:
        name = "test.{state}.{model}.{index}.trec".format(**row)
        # By rank: ir-measures takes RR@10 from a script whose tie rule is not trec_eval's.
        lines = (workdir / "runs" / name).read_text().splitlines()
        run = [ir_measures.ScoredDoc(x[0], x[2], -float(x[3])) for x in map(str.split, lines)]
        measures = [ir_measures.parse_measure(metric) for metric in row["metrics"]]
        expected = ir_measures.calc_aggregate(measures, qrels, run)
        for measure, value in expected.items():
            assert row["metrics"][str(measure)] == pytest.approx(value, abs=1e-9)


def test_answers_judge_where_there_are_no_labels(finished, bert_folder, tmp_path):
    """Natural Questions' way: a hit is a passage that holds an answer, whatever its label."""
    given, _ = finished
    corpus = [json.loads(line) for line in (pathlib.Path(given.data.path) / "corpus.jsonl").open()]
    words = [passage["text"].split() for passage in corpus]
    data = tmp_path / "nq"
    data.mkdir()
    answers = {f"t{i}": (" ".join(words[i][3:6]), "nowhere") for i in range(40, 46)}
    answers["t46"] = ("no passage holds this",)
    tables = {
        "para.txt": [(p["_id"], p["text"]) for p in corpus],
        # One in a hundred is dev's.
        "train.query.txt": [(f"q{i}", " ".join(words[i % 40][:5])) for i in range(100)],
        "qrels.train.tsv": [(f"q{i}", f"p{i % 40}") for i in range(100)],
        "test.query.txt": [(f"t{i}", " ".join(words[i][1:6])) for i in range(40, 47)],
        "test.answers.txt": [(query, *found) for query, found in answers.items()],
    }
    for name, rows in tables.items():
        (data / name).write_text("".join("\t".join(row) + "\n" for row in rows))
    config = tiny_config(data, bert_folder)
    config.data.dataset = "rocketqa"
    config.evaluate.metrics = ("RR@10", "Success@5", "Success@20")
    run = open_run(config, tmp_path / "workdir")
    run.workdir.mkdir()
    store = pipeline.prepare(run)
    report = evaluation.evaluate(run, store, "test", ("exact",), states=("zero_shot",))
    floor, row = report["rows"]
    assert (row["queries"], report["titles"]) == (7, False)
    # The answers are words of the passages, as the queries are.
    assert floor["state"] == "bm25"
    assert floor["metrics"]["Success@5"] > 0.5
    ranked = {query: [] for query in answers}
    for line in (run.workdir / "runs/test.zero_shot.retriever.exact.trec").read_text().splitlines():
        query, _, passage, *_ = line.split()
        text = f" {corpus[int(passage[1:])]['text']} "
        ranked[query].append(any(f" {answer} " in text for answer in answers[query]))
    ranks = [hits.index(True) + 1 if True in hits else np.inf for hits in ranked.values()]
    assert 0 < np.mean(np.array(ranks) <= 5) < 1
    expected = {"RR@10": np.mean([1 / rank if rank <= 10 else 0 for rank in ranks])}
    expected |= {f"Success@{k}": np.mean(np.array(ranks) <= k) for k in (5, 20)}
    assert row["metrics"] == pytest.approx(expected)
    # What needs all relevant passages cannot be known.
    run.config.evaluate.metrics = ("nDCG@10",)
    for act in (
        lambda: pipeline.prepare(run),
        lambda: evaluation.evaluate(run, store, "test", ("exact",), states=("zero_shot",)),
    ):
        with pytest.raises(InputError, match="nDCG@10 needs labels of all relevant passages"):
            act()


def test_scann_of_a_small_collection_is_exact(finished):
    _, workdir = finished
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    assert all(row["recall@10 against exact"] == 1.0 for row in rows if row["index"] == "scann")


def test_reranked_run_keeps_the_retrievers_candidates_and_its_tail(finished):
    config, workdir = finished

    def ranked(model):
        lines = (workdir / "runs" / f"test.joint.{model}.exact.trec").read_text().splitlines()
        found = {}
        for line in lines:
            query, _, passage, *_ = line.split()
            found.setdefault(query, []).append(passage)
        return found

    retriever, reranker = ranked("retriever"), ranked("reranker")
    depth = config.evaluate.rerank_depth
    for query, passages in retriever.items():
        assert set(reranker[query][:depth]) == set(passages[:depth])
        assert reranker[query][depth:] == passages[depth:]


@pytest.fixture
def evaluated_again(finished, tmp_path):
    """`again(setting=value) -> (report, rows, whole, part)`: the run evaluated by other settings.

    `rows` are the test queries that were re-ranked; `whole` and `part` hold the values of all queries
    before and now.
    """
    config, workdir = finished

    def again(**changed):
        shutil.copytree(workdir, tmp_path / "w")
        own = config_lib.loads(config_lib.dumps(config))
        own.evaluate.update(changed)
        store = tokens.open_store(workdir / "data" / "tokens")
        report = evaluation.evaluate(open_run(own, tmp_path / "w"), store, "test", ("exact",))
        run_file = tmp_path / "w" / "runs" / "test.joint.reranker.exact.trec"
        asked = dict.fromkeys(line.split()[0] for line in run_file.read_text().splitlines())
        rows = [store.splits["test"].ids.index(query) for query in asked]
        return (
            report,
            rows,
            *(
                dict(np.load(folder / "eval" / "test.per_query.npz"))
                for folder in (workdir, tmp_path / "w")
            ),
        )

    return again


def test_evaluation_of_some_queries_is_theirs_in_the_whole(evaluated_again):
    report, rows, whole, part = evaluated_again(queries=5)
    assert len(rows) == 5
    assert all(row["queries"] == 5 for row in report["rows"])
    assert "joint.reranker.exact.nDCG@10" in part
    for name, values in part.items():
        np.testing.assert_allclose(values, whole[name][rows], atol=1e-6)


def test_all_rows_stand_on_the_queries_that_are_reranked(evaluated_again):
    report, rows, whole, part = evaluated_again(rerank_queries=5)
    every = len(whole["joint.retriever.exact.RR@10"])
    assert len(rows) == 5 < every
    for row in report["rows"]:
        key = "{state}.{model}.{index}.".format(**row)
        assert row["queries"] == 5
        for metric, value in row["metrics"].items():
            assert value == pytest.approx(whole[key + metric][rows].mean(), abs=1e-6)
        assert ("all_queries" in row) == (row["model"] != "reranker")
        if "all_queries" in row:
            assert row["all_queries"]["queries"] == every
            for metric, value in row["all_queries"]["metrics"].items():
                assert value == pytest.approx(whole[key + metric].mean(), abs=1e-6)
    shown = results.render(report)
    assert f"5 test queries, a sample of {every};" in shown
    table = shown.partition(f"the same over all {every} queries:")[2].splitlines()[1:]
    assert [line.split()[1] for line in table[2:6]] == ["bm25", *["retriever"] * 3]
    for name, values in part.items():
        expected = whole[name][rows] if ".reranker." in name else whole[name]
        np.testing.assert_allclose(values, expected, atol=1e-6)
    name = "joint.{}.exact.RR@10"
    difference = part[name.format("reranker")] - whole[name.format("retriever")][rows]
    (compared,) = (x for x in report["significance"] if x["b"] == "joint retriever")
    assert compared["difference"] == pytest.approx(difference.mean())


def test_dev_pool_holds_positives_and_candidates_and_a_perfect_score_is_one(finished):
    config, workdir = finished
    run = open_workdir(workdir)
    store = tokens.open_store(workdir / "data" / "tokens")
    candidates = mining.retrieve(run, store)["dev"]
    dev = Dev(run.config, run.forward, store, candidates)
    positives = store.splits["dev"].positives()
    needed = {*candidates.passages_QxN.reshape(-1).tolist(), *positives[1].tolist()}
    assert needed <= set(dev.pool_N.tolist())
    assert len(dev.pool_N) == len(set(dev.pool_N.tolist())) == max(config.dev.pool, len(needed))
    assert len(Dev(run.config, run.forward, store, None).pool_N) == config.dev.pool
    found_QxK = np.stack([positives[1], (positives[1] + 1) % 48], axis=1)
    assert dev._values(found_QxK, np.array([[2.0, 1.0]] * 8)).tolist() == [1.0] * 8
    assert dev._values(found_QxK, np.array([[1.0, 2.0]] * 8)).tolist() == [0.5] * 8


def test_dev_is_measured_as_the_config_says(finished):
    config, workdir = finished
    run, store = open_workdir(workdir), tokens.open_store(workdir / "data" / "tokens")
    run.config.dev.metric = "Success@1"
    dev = Dev(run.config, run.forward, store, None)
    positives_Q = store.splits["dev"].positives()[1]
    found_QxK = np.stack([positives_Q, (positives_Q + 1) % 48], axis=1)
    assert dev._values(found_QxK, np.array([[2.0, 1.0]] * 8)).tolist() == [1.0] * 8
    assert dev._values(found_QxK, np.array([[1.0, 2.0]] * 8)).tolist() == [0.0] * 8
    # The whole pool, and the retriever ranks as deep as the metric looks.
    run.config.dev.metric = f"R@{config.dev.pool}"
    params = {"retriever": run.initial("retriever")}
    (values_Q,) = Dev(run.config, run.forward, store, None).values(params).values()
    assert values_Q.tolist() == [1.0] * 8


def test_the_pool_may_hold_what_the_start_finds(finished, tmp_path):
    config, workdir = finished
    changed = config_lib.loads(config_lib.dumps(config))
    changed.dev.update({"hard": 3, "pool": 1})
    run, store = open_run(changed, tmp_path), tokens.open_store(workdir / "data" / "tokens")
    towers, rows_Q, every_N = run.initial("retriever"), np.arange(8), np.arange(48)
    queries_QxD = encode.queries(
        run.forward, tower(towers, "query"), store.splits["dev"].texts, rows_Q
    )
    passages_NxD = encode.passages(run.forward, tower(towers, "passage"), store, every_N)
    top_QxK = np.argsort(-(queries_QxD @ passages_NxD.T), axis=1)[:, :3]
    hard_QxK = pipeline._found_by_start(run, store)
    # Queries are drawn at random, and here all of them.
    order_Q = np.argsort(lists_lib.subset(8, changed.dev.queries, changed.seed))
    np.testing.assert_array_equal(hard_QxK[order_Q], top_QxK)
    # Padding is no passage.
    padded_QxK = np.append(hard_QxK, np.full((8, 1), -1), axis=1)
    pool_N = Dev(run.config, run.forward, store, None, padded_QxK).pool_N
    positives_N = store.splits["dev"].positives()[1]
    np.testing.assert_array_equal(pool_N, np.union1d(top_QxK, positives_N))


def test_training_batches_have_lengths_of_their_own(finished, tmp_path, capsys):
    config, workdir = finished
    store, provenance = tokens.open_store(workdir / "data" / "tokens"), lists_lib.Provenance
    rows_L = np.arange(8)
    lists = lists_lib.Lists(
        rows_L,
        np.stack([rows_L, rows_L + 8], axis=1),
        np.array([[provenance.LABELLED_POSITIVE, provenance.UNDENOISED_NEGATIVE]] * 8),
    )
    longest = {}
    for lengths in ((0, 0), (9, 12), (20, 40)):
        changed = config_lib.loads(config_lib.dumps(config))
        changed.data.train_passage_length, changed.data.train_pair_length = lengths
        run = open_run(changed, tmp_path / str(lengths))
        stage = stages.make_stage(run.config, run.models, "joint")
        batches = stage_batches(run, store, "joint", stage, lists)
        longest[lengths] = [
            batches.ragged(kind, 0).lengths_N.max() for kind in ("passages", "pairs")
        ]
        assert (run.inputs.passage_length, run.inputs.pair_length) == (16, 32)
        assert run.forward.inputs == run.inputs
        # 0 is the length of search.
        resolved = run.config.data
        assert resolved.train_passage_length == (lengths[0] or 16)
        assert resolved.train_pair_length == (lengths[1] or 32)
    assert longest[9, 12] == [9, 12]
    assert longest[0, 0][0] == 16 < longest[20, 40][0]
    changed.data.update({"train_passage_length": 9, "train_pair_length": 12})
    run = open_run(changed, tmp_path / "printed")
    pipeline.prepare(run)
    said = capsys.readouterr()
    cut = {
        key: re.search(f"in {key}: .*passage_length {n}: (.*)%, pair_length", said.out + said.err)
        for key, n in (("search", 16), ("training", 9))
    }
    assert float(cut["search"][1]) < float(cut["training"][1])
