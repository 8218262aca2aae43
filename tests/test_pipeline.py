import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import ir_measures
import jax
import numpy as np
import pytest
import sentence_transformers
import torch
import tqdm
import transformers
from absl import flags
from absl.testing import flagsaver
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from rqv2_jax import config as config_lib
from rqv2_jax import evaluate
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data import tokens
from rqv2_jax.errors import InputError
from rqv2_jax.models import weights
from rqv2_jax.ranking import trec
from rqv2_jax.recipe import evaluation, mining, pipeline, rankings, results
from rqv2_jax.recipe import scorer as score
from rqv2_jax.recipe.claim import claim, open_workdir
from rqv2_jax.recipe.dev import Dev
from rqv2_jax.recipe.run import as_released, open_run
from rqv2_jax.recipe.scoreboard import Scoreboard
from rqv2_jax.recipe.texts import open_collection, open_store, with_topics
from rqv2_jax.recipe.workdir import alone, branch
from rqv2_jax.retrieval import bm25, encode
from rqv2_jax.tools import denoising, figures
from rqv2_jax.training import train
from rqv2_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent
WORDS = [
    *("river", "stone", "engine", "garden", "winter", "copper", "letter", "market", "signal"),
    *("forest", "bridge", "silver", "doctor", "island", "planet", "orange", "mirror", "castle"),
]


def write_beir(folder, *, passages=48, seed=0):
    """A collection in which a query repeats words of its one relevant passage."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, 12)) for _ in range(passages)]
    (folder / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": f"p{i}", "title": " ".join(text.split()[:2]), "text": text}
        for i, text in enumerate(texts)
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in corpus))
    queries = []
    for split, rows in (("train", range(32)), ("dev", range(32, 40)), ("test", range(40, 48))):
        lines = ["query-id\tcorpus-id\tscore"]
        for i in rows:
            text = " ".join(rng.permutation(texts[i].split())[:5])
            queries.append({"_id": f"q{i}", "text": text})
            lines.append(f"q{i}\tp{i}\t1")
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    return folder


def tiny_config(data, bert_folder):
    config = config_lib.default()
    config.data.path = str(data)
    config.data.update({"query_length": 16, "passage_length": 16, "pair_length": 32})
    config.model.update({"weights": str(bert_folder), "num_layers": 1, "pooling": "mean"})
    for stage, list_size in (("retriever", None), ("reranker", 4), ("joint", 4)):
        config[stage].update(
            {"epochs": 1.5, "batch": 8, "learning_rate": 1e-3, "log_every": 2}
            | {"evaluate_every": 3, "save_every": 2}
        )
        if list_size:
            config[stage].list_size = list_size
    config.mine.depth = 8
    config.mine.negative_below = 0.5
    config.dev.update({"queries": 8, "depth": 6, "pool": 20})
    config.evaluate.update({"batch_tokens": 512, "retrieve_depth": 20, "rerank_depth": 6})
    config.evaluate.released.most_passages = 0
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, bert_folder):
    """A workdir in which the whole recipe has run once."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = tiny_config(write_beir(folder / "data"), bert_folder)
    pipeline.main(config, folder / "workdir")
    return config, folder / "workdir"


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


def test_bm25_ranks_the_passages_that_share_words_with_the_query(finished):
    """By an own count over titles and texts; and the re-ranker re-ranks the first of them."""
    config, workdir = finished
    data = pathlib.Path(config.data.path)
    corpus = [json.loads(line) for line in (data / "corpus.jsonl").open()]
    words = {p["_id"]: f"{p['title']} {p['text']}".split() for p in corpus}
    mean = np.mean([len(each) for each in words.values()])
    queries = {
        q["_id"]: q["text"].split() for q in map(json.loads, (data / "queries.jsonl").open())
    }
    found = trec.read_run(workdir / "runs" / "test.bm25.bm25.bm25.trec")
    reranked = trec.read_run(workdir / "runs" / "test.joint.reranker.bm25.trec")
    assert len(found) == 8
    for query, ranked in found.items():
        scores = {}
        for passage, text in words.items():
            for word in queries[query]:
                holding = sum(word in each for each in words.values())
                idf = np.log(1 + (len(words) - holding + 0.5) / (holding + 0.5))
                count, length = text.count(word), 1 - 0.75 + 0.75 * len(text) / mean
                scores[passage] = scores.get(passage, 0) + idf * count / (count + 1.2 * length)
        ids, given = zip(*ranked)
        expected = sorted(scores.values(), reverse=True)[:20]
        np.testing.assert_allclose(given, [score for score in expected if score > 0], rtol=1e-4)
        np.testing.assert_allclose(given, [scores[passage] for passage in ids], rtol=1e-4)
        depth = config.evaluate.rerank_depth
        again = [passage for passage, _ in reranked[query]]
        assert set(again[:depth]) == set(ids[:depth])
        assert again[depth:] == list(ids[depth:])


@pytest.fixture(scope="module")
def released(tmp_path_factory, bert_folder):
    """A run that reads less than its model folder can: run, token store, results, the model."""
    folder = tmp_path_factory.mktemp("released")
    modules = [Transformer(str(bert_folder)), Pooling(32, pooling_mode="mean"), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save(str(folder / "model"))
    config = tiny_config(write_beir(folder / "data"), folder / "model")
    config.data.update({"query_length": 4, "passage_length": 8})
    config.evaluate.released.most_passages = 48
    config.model.update({"pooling": "cls", "similarity": "dot"})
    run = open_run(config, folder / "workdir")
    store = pipeline.prepare(run)
    report = evaluation.evaluate(run, store, "test", ("exact",), states=("zero_shot",))
    return run, store, report, model


def test_the_released_model_is_measured_at_its_own_length_and_similarity(released):
    """Texts in, ranking out: what sentence-transformers makes of the folder and the texts."""
    run, _, report, model = released
    texts = open_collection(run.config.data, run.workdir)
    passages = {p.id: f"{p.title} {p.text}" for p in texts.passages()}
    queries = {q.id: q.text for q in texts.queries("test")}
    scores_QxN = model.encode(list(queries.values())) @ model.encode(list(passages.values())).T
    found = trec.read_run(run.workdir / "runs" / "test.released.retriever.exact.trec")
    reciprocal = []
    for query, scores_N in zip(queries, scores_QxN):
        ranked = [list(passages)[row] for row in np.argsort(-scores_N)[:20]]
        assert [passage for passage, _ in found[query]] == ranked
        rank = ranked.index(f"p{query[1:]}") if f"p{query[1:]}" in ranked[:10] else None
        reciprocal.append(0 if rank is None else 1 / (rank + 1))
    row = next(row for row in report["rows"] if row["state"] == "released")
    assert row["metrics"]["RR@10"] == pytest.approx(np.mean(reciprocal))
    zero_shot = next(row for row in report["rows"] if row["state"] == "zero_shot")
    assert row["metrics"]["RR@10"] != zero_shot["metrics"]["RR@10"]


def test_every_trained_state_is_compared_with_the_released_model(released):
    """Which exact search serves, whatever index the run's own rows are by."""
    run, store, _, _ = released
    own = Scoreboard(run, store, "test")
    keys = [("joint", "retriever", "scann"), ("released", "retriever", "exact")]
    own.entries = dict.fromkeys([*keys, ("zero_shot", "retriever", "scann")])
    assert own._against_floors("scann") == [tuple(keys)]


def test_the_released_model_takes_the_untrained_rows_where_the_run_reads_alike(released, capsys):
    run, store, _, _ = released
    own = as_released(run)
    capsys.readouterr()
    report = evaluation.evaluate(own, store, "test", ("exact",), states=("zero_shot",))
    rows = {row["state"]: row["metrics"] for row in report["rows"]}
    assert rows["released"] == rows["zero_shot"]
    assert "released: the starting model" not in capsys.readouterr().out


def test_a_floor_that_says_nothing_is_left_out_with_a_line(released, monkeypatch, capsys, tmp_path):
    """Texts without a word in common; a folder that only the config makes readable; no bm25s."""
    run, store, _, _ = released
    run = dataclasses.replace(run, workdir=tmp_path)
    rows_Q = np.arange(8)

    def nothing(passages, queries, depth, settings):
        return np.full((len(queries), depth), -1), np.full((len(queries), depth), -np.inf)

    monkeypatch.setattr(bm25, "search", nothing)
    assert rankings.by_bm25(run, store, "test", rows_Q) is None
    assert "bm25: left out, as no query has a word of a passage" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    assert rankings.by_bm25(run, store, "test", rows_Q) is None
    assert "bm25: left out (the floor BM25 needs the package Stemmer" in capsys.readouterr().out

    def refuse(run):
        raise InputError("similarity 'euclidean' is not understood")

    monkeypatch.setattr(rankings, "as_released", refuse)
    assert rankings.by_released(run, store, "test", rows_Q) is None
    assert "released: left out, as the folder cannot be read" in capsys.readouterr().out


def test_a_retriever_that_reads_alike_is_not_measured_twice(released, capsys):
    """Whatever the re-ranker reads."""
    run, store, _, _ = released
    own = as_released(run)
    own = dataclasses.replace(own, inputs=dataclasses.replace(own.inputs, pair_length=20))
    rankings.by_released(own, store, "test", np.arange(8))
    assert "released: the starting model" not in capsys.readouterr().out


def test_bm25_is_left_out_of_larger_collections_and_where_texts_are_gone(
    finished, tmp_path, capsys, monkeypatch
):
    config, workdir = finished
    own = config_lib.loads(config_lib.dumps(config))

    def states():
        run = open_run(own, tmp_path / "w")
        (tmp_path / "w").mkdir(exist_ok=True)
        store = tokens.open_store(workdir / "data" / "tokens")
        report = evaluation.evaluate(run, store, "test", ("exact",), states=("zero_shot",))
        return [row["state"] for row in report["rows"]], report["verdict"]

    own.evaluate.bm25.most_passages = 47
    assert states() == (["zero_shot"], [])
    said = "bm25: left out, as 48 passages are more than config.evaluate.bm25.most_passages, 47"
    assert said in capsys.readouterr().out
    own.evaluate.bm25.most_passages = 48
    own.data.path = str(tmp_path / "nowhere")
    assert states() == (["zero_shot"], [])
    assert "bm25: left out, as the texts cannot be read" in capsys.readouterr().out
    # Brought back they are read, and what was found is found again without them.
    own.data.path = config.data.path
    assert states() == (["bm25", "zero_shot"], [])
    own.data.path = str(tmp_path / "nowhere")
    assert states() == (["bm25", "zero_shot"], [])


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


def test_joint_training_changes_both_models_and_starts_from_the_warm_ones(finished):
    config, workdir = finished
    run = open_workdir(workdir)
    last = last_joint_params(run)
    for model, joint in last.items():
        warm = run.params(state="reranker", model=model)
        leaves = zip(*(map(np.asarray, _leaves(tree)) for tree in (warm, joint)))
        moved = [float(np.abs(a - b).max()) for a, b in leaves]
        assert max(moved) > 0
        # Adam moves a weight by at most about the learning rate in a step.
        steps = 6
        assert max(moved) < 2 * steps * config.joint.learning_rate
    assert run.trained_by(state="reranker", model="retriever") == "retriever"


def last_joint_params(run):
    """The params of both models after the last joint step, whether they are the best or not."""
    params = {model: run.initial(model) for model in ("retriever", "reranker")}
    rates = {} if run.config.joint.train_reranker else {"reranker": 0.0}
    optimizer = train.make_optimizer(run.config.optimizer, run.config.joint, 6, rates)
    checkpoints = Checkpoints(run.workdir / "joint")
    state = checkpoints.restore_last(train.init_state(params, optimizer, run.sharding))
    checkpoints.close()
    assert int(state.step) == 6
    return state.params


def _leaves(tree):
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in _leaves(tree[key])]
    return [tree]


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


@pytest.fixture
def deep(finished, tmp_path):
    """The finished run's copy, and graded labels of new queries over its passages, as TREC's are."""
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    corpus = [json.loads(line) for line in (pathlib.Path(config.data.path) / "corpus.jsonl").open()]
    rng = np.random.default_rng(3)
    asked = [" ".join(rng.permutation(corpus[i]["text"].split())[:4]) for i in range(10)]
    rows = [f"{i}\t{text}\n" for i, text in enumerate(asked)]
    (tmp_path / "msmarco-test2019-queries.tsv").write_text("".join(rows))
    # Queries 8 and 9 are not judged, and query 7 has a best grade of 1.
    graded = [
        (i, (i + n) % 48, max(0, 3 - n) if i < 7 else n % 2) for i in range(8) for n in range(6)
    ]
    lines = [f"{query} Q0 p{passage} {grade}\n" for query, passage, grade in graded]
    (tmp_path / "2019qrels-pass.txt").write_text("".join(lines))
    return tmp_path


def evaluate_program(folder, **more):
    arguments = {
        "workdir": str(folder / "w"),
        "topics": str(folder / "msmarco-test2019-queries.tsv"),
        "qrels": str(folder / "2019qrels-pass.txt"),
    } | more
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**arguments):
        evaluate.main()
    return json.loads((folder / "w" / "eval" / "msmarco-test2019-queries.json").read_text())


def test_further_queries_over_the_runs_passages(deep):
    before = {path: path.read_bytes() for path in (deep / "w").rglob("test.*") if path.is_file()}
    report = evaluate_program(deep, min_relevance=2)
    assert report["rows"]
    assert all(row["queries"] == 8 for row in report["rows"])
    qrels = list(ir_measures.read_trec_qrels(str(deep / "2019qrels-pass.txt")))
    for row in report["rows"]:
        assert row["split"] == "msmarco-test2019-queries"
        assert {"RR(rel=2)@10", "R(rel=2)@1000", "nDCG@10"} < row["metrics"].keys()
        name = "{split}.{state}.{model}.{index}.trec".format(**row)
        # By rank: ir-measures takes RR@10 from a script whose tie rule is not trec_eval's.
        lines = (deep / "w" / "runs" / name).read_text().splitlines()
        run = [ir_measures.ScoredDoc(x[0], x[2], -float(x[3])) for x in map(str.split, lines)]
        measures = [ir_measures.parse_measure(metric) for metric in row["metrics"]]
        for measure, value in ir_measures.calc_aggregate(measures, qrels, run).items():
            assert row["metrics"][str(measure)] == pytest.approx(value, abs=1e-9)
    assert {each["metric"] for each in report["significance"]} == {"RR(rel=2)@10"}
    assert all(path.read_bytes() == content for path, content in before.items())
    # Other text under the same names is searched for anew, over the same vectors.
    topics = deep / "msmarco-test2019-queries.tsv"
    queries = dict(line.split("\t") for line in topics.read_text().splitlines())
    blocks = [
        f"<top>\n<num> Number: {i}\n<title> {queries[str(7 - i)]}\n</top>\n" for i in range(8)
    ]
    topics.write_text("".join(blocks))
    stamps = {path: path.stat().st_mtime_ns for path in (deep / "w" / "vectors").rglob("*")}
    other = evaluate_program(deep)
    assert stamps == {path: path.stat().st_mtime_ns for path in (deep / "w" / "vectors").rglob("*")}
    assert other["rows"][0]["metrics"]["nDCG@10"] != report["rows"][0]["metrics"]["nDCG@10"]
    assert "RR@10" in other["rows"][0]["metrics"]


@pytest.mark.parametrize(
    ("topics", "qrels", "name", "message"),
    [
        ("0\ta\n", "0 0 p1 1\n", "test.tsv.gz", "has a split 'test' of its own"),
        ("0\ta\n", "0 0 p1 1\n7 0 p1 1\n", "t.txt", "qrels:2: qrels name query '7'"),
        ("0\ta\n", "0 0 p1 1\n0 0 x 1\n", "t.tsv", "qrels:2: qrels name passage 'x'"),
        ("0\ta\n", "0 0 p1 0\n", "t.tsv", "qrels: no relevance is above 0"),
        ("0\ta\n", None, "t.tsv", "qrels: no such file"),
    ],
)
def test_further_queries_that_do_not_fit(finished, tmp_path, topics, qrels, name, message):
    run = open_workdir(finished[1])
    (tmp_path / name).write_text(topics)
    if qrels is not None:
        (tmp_path / "qrels").write_text(qrels)
    store = tokens.open_store(run.workdir / "data" / "tokens")
    with pytest.raises(InputError, match=message):
        with_topics(run, store, tmp_path / name, tmp_path / "qrels")


def test_topics_and_qrels_go_together():
    for arguments, message in (
        (["--topics=t"], "--topics and --qrels go together"),
        (["--qrels=q"], "--topics and --qrels go together"),
        (["--topics=t", "--qrels=q", "--split=test"], "--topics takes the place of --split"),
        (["--candidates=c", "--index=scann"], "--candidates takes the place of --index"),
    ):
        ended = run_program("rqv2_jax.evaluate", "--workdir=w", *arguments)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert message in ended.stderr


def rerank_program(folder, name, **more):
    flags.FLAGS.mark_as_parsed()
    arguments = {"workdir": str(folder / "w"), "candidates": str(folder / f"{name}.trec")} | more
    with flagsaver.flagsaver(**arguments):
        evaluate.main()
    report = json.loads((folder / "w" / "eval" / f"test.{name}.json").read_text())
    with np.load(folder / "w" / "eval" / f"test.{name}.per_query.npz") as file:
        return report, dict(file)


def test_candidates_of_a_run_file_are_the_same_for_every_state(finished, tmp_path):
    _, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    source = workdir / "runs" / "test.retriever.retriever.exact.trec"
    lines = source.read_text().splitlines(keepends=True)
    # It is the scores that rank.
    rng = np.random.default_rng(0)
    (tmp_path / "first.trec").write_text("".join(rng.permutation(lines)))
    report, values = rerank_program(tmp_path, "first")
    assert [(row["state"], row["model"], row["index"]) for row in report["rows"]] == [
        ("candidates", "given", "first"),
        ("reranker", "reranker", "first"),
        ("joint", "reranker", "first"),
    ]
    with np.load(workdir / "eval" / "test.per_query.npz") as file:
        own = dict(file)
    for metric in ("RR@10", "nDCG@10"):
        for key, same in (
            (f"candidates.given.first.{metric}", f"retriever.retriever.exact.{metric}"),
            (f"reranker.reranker.first.{metric}", f"reranker.reranker.exact.{metric}"),
        ):
            np.testing.assert_allclose(values[key], own[same], atol=1e-6)
    difference = values["joint.reranker.first.RR@10"] - values["reranker.reranker.first.RR@10"]
    assert report["significance"][0]["b"] == "reranker reranker"
    assert report["significance"][0]["difference"] == pytest.approx(difference.mean())
    # By the re-ranker of the joint state itself, over the file's first passages of a query.
    query, given = "q40", [line.split()[2] for line in lines if line.startswith("q40 ")]
    texts = {
        passage["_id"]: (passage["title"], passage["text"])
        for passage in map(json.loads, (workdir.parent / "data" / "corpus.jsonl").open())
    }
    asked = {
        each["_id"]: each["text"]
        for each in map(json.loads, (workdir.parent / "data" / "queries.jsonl").open())
    }
    _, scores_K = score.open_scorer(workdir, "joint")(asked[query], [texts[p] for p in given])
    written = tmp_path / "w" / "runs" / "test.joint.reranker.first.trec"
    # As the config has it, and as the command line does.
    for depth in (6, 3):
        rows = [line.split() for line in written.read_text().splitlines()]
        order = np.argsort(-np.asarray(scores_K[:depth]))
        expected = [given[i] for i in order] + given[depth:]
        assert [row[2] for row in rows if row[0] == query] == expected
        rerank_program(tmp_path, "first", rerank_depth=3)


def test_queries_without_candidates_count_0_and_short_lists_stay_short(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "w")
    rows = ["q41 Q0 p3 1 2.5 bm25\n", "q41 Q0 p41 2 1.5 bm25\n", "q0 Q0 p0 1 1 bm25\n"]
    rows += [f"q42 Q0 p{i} 1 {-i} bm25\n" for i in range(40)]
    (tmp_path / "anserini.trec").write_text("".join(rows))
    report, values = rerank_program(tmp_path, "anserini")
    assert all(row["queries"] == 8 for row in report["rows"])
    given = values["candidates.given.anserini.RR@10"]
    np.testing.assert_allclose(given, [0, 0.5, 0, 0, 0, 0, 0, 0])
    assert "8 test queries, 2 of them with candidates" in results.render(report)
    found = values["joint.reranker.anserini.RR@10"]
    assert found[1] in (0.5, 1)
    assert not np.delete(found, 1).any()
    written = (tmp_path / "w" / "runs" / "test.joint.reranker.anserini.trec").read_text()
    assert sorted(line.split()[2] for line in written.splitlines() if "q41" in line) == [
        "p3",
        "p41",
    ]
    # Another file under the name is scored anew.
    (tmp_path / "anserini.trec").write_text("q43 Q0 p43 1 1 bm25\n")
    _, values = rerank_program(tmp_path, "anserini")
    np.testing.assert_allclose(values["joint.reranker.anserini.RR@10"], np.eye(8)[3])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "b",
            "q41 Q0 nowhere 1 2.5 x\n",
            "passage 'nowhere' of query 'q41' is not in the collection",
        ),
        ("b", "q0 Q0 p0 1 2.5 x\n", "holds none of the 8 test queries of .* that are re-ranked"),
        ("b", "q41 Q0 p0 1\n", "b.trec:1: the rank 'p0' is not a number"),
        ("b", "q41 Q0 p0 1 2\n", "b.trec:1: 5 columns"),
        ("exact", "q41 Q0 p0 1 2.5 x\n", "exact.trec: results are named after the file; rename it"),
        ("bm25", "q41 Q0 p0 1 2.5 x\n", "bm25.trec: results are named after the file; rename it"),
    ],
)
def test_candidates_that_cannot_be_used(finished, tmp_path, name, text, message):
    (tmp_path / "w").symlink_to(finished[1])
    (tmp_path / f"{name}.trec").write_text(text)
    with pytest.raises(InputError, match=message):
        rerank_program(tmp_path, name)


def test_candidates_of_queries_that_are_not_reranked_do_not_matter(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    own = config_lib.loads(config_lib.dumps(config))
    own.evaluate.rerank_queries = 5
    run = open_run(own, tmp_path / "w")
    store = tokens.open_store(workdir / "data" / "tokens")
    evaluation.evaluate(run, store, "test", ("exact",), states=("joint",))
    source = tmp_path / "w" / "runs" / "test.joint.retriever.exact.trec"
    sample = tmp_path / "w" / "runs" / "test.joint.reranker.exact.trec"
    asked = {line.split()[0] for line in sample.read_text().splitlines()}
    assert len(asked) == 5
    lines = source.read_text().splitlines(keepends=True)
    others = [line.replace(" p", " unknown") for line in lines if line.split()[0] not in asked]
    (tmp_path / "some.trec").write_text(
        "".join([*others, *(line for line in lines if line.split()[0] in asked)])
    )
    report = evaluation.evaluate_candidates(run, store, "test", tmp_path / "some.trec", "some")
    again = trec.read_run(tmp_path / "w" / "runs" / "test.joint.reranker.some.trec")
    assert all(row["queries"] == 5 for row in report["rows"])
    expected = trec.read_run(sample)
    assert {query: [p for p, _ in found] for query, found in again.items()} == {
        query: [p for p, _ in found] for query, found in expected.items()
    }


def test_metrics_without_rr_are_compared_by_their_first(deep):
    run = open_workdir(deep / "w")
    run.config.evaluate.metrics = ("Success@5", "R@1000")
    store = tokens.open_store(run.workdir / "data" / "tokens")
    report = evaluation.evaluate(run, store, "test", ("exact",))
    assert {each["metric"] for each in report["significance"]} == {"Success@5"}


def test_second_run_of_the_same_command_does_nothing_and_keeps_the_results(finished):
    config, workdir = finished
    before = (workdir / "results.json").read_text()
    checkpoint = workdir / "joint" / "last"
    stamps = {p: p.stat().st_mtime_ns for p in checkpoint.rglob("*") if p.is_file()}
    pipeline.main(config, workdir)
    assert (workdir / "results.json").read_text() == before
    assert stamps == {p: p.stat().st_mtime_ns for p in checkpoint.rglob("*") if p.is_file()}


# Neither checkpoints nor what says of a stage's training what it was; logs are only written.
KEPT = ("best", "last", "begun.txt", "finished.txt")


@pytest.mark.parametrize("share", [0, 0.6])
def test_whatever_file_of_a_workdir_is_damaged_the_same_command_mends_it(
    finished, tmp_path, capsys, share
):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    damaged = [
        path
        for path in sorted((tmp_path / "w").rglob("*"))
        if path.is_file()
        and path.stat().st_size
        and not set(path.relative_to(tmp_path / "w").parts) & set(KEPT)
        and ".tfevents." not in path.name
    ]
    found = {path.suffix for path in damaged}
    assert {".npz", ".npy", ".json", ".bin", ".trec", ".pb", ".pbtxt"} <= found
    for path in damaged:
        os.truncate(path, int(share * path.stat().st_size))
    capsys.readouterr()
    pipeline.main(config, tmp_path / "w")
    said = capsys.readouterr().out
    assert (tmp_path / "w" / "results.json").read_text() == (workdir / "results.json").read_text()
    # A line for each thing that is read, of which a folder may be one.
    lines = [line for line in said.splitlines() if line.endswith("it is made again")]
    named = {line.partition(": cannot be read")[0] for line in lines}
    folder = tmp_path / "w"
    assert named >= {
        *(str(folder / name) for name in ("config.json", "data/tokens/manifest.json")),
        *(str(folder / "vectors" / stage / "manifest.json") for stage in ("zero_shot", "joint")),
        *map(str, folder.glob("lists/*.retrieved.npz")),
        *map(str, folder.glob("lists/*.scores/*.npz")),
        *map(str, folder.glob("eval/test.*.exact.npz")),
        str(folder / "eval/test.bm25.npz"),
    }
    assert len(lines) == len(named)


def test_a_damaged_token_store_is_made_again_from_the_same_texts_only(finished, tmp_path, capsys):
    config, workdir = finished
    shutil.copytree(workdir.parent, tmp_path / "all", symlinks=True)
    folder = tmp_path / "all" / "workdir"
    own = config_lib.loads(config_lib.dumps(config))
    own.data.path = str(tmp_path / "all" / "data")
    offsets = folder / "data/tokens/passages/texts.offsets.npy"
    before = offsets.read_bytes()
    os.truncate(offsets, 100)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(workdir=str(folder), split="dev"):
        evaluate.main()
    assert offsets.read_bytes() == before
    assert "data/tokens: cannot be read (" in capsys.readouterr().out
    os.truncate(offsets, 100)
    queries = tmp_path / "all" / "data" / "queries.jsonl"
    queries.write_text(queries.read_text().replace("river", "stone", 1))
    with pytest.raises(InputError, match="the texts of data have changed since this workdir was"):
        open_store(open_run(own, folder))
    with pytest.raises(InputError, match="holds no token store; run"):
        open_store(open_run(own, tmp_path / "new"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("corpus.jsonl", lambda text: text.replace("river", "stone", 1)),
        ("qrels/train.tsv", lambda text: text.replace("q0\tp0\t1\n", "")),
    ],
)
def test_checkpoints_of_other_data_are_not_taken_for_these(finished, tmp_path, name, change):
    given, workdir = finished
    shutil.copytree(workdir.parent, tmp_path / "all", symlinks=True)
    path = tmp_path / "all" / "data" / name
    path.write_text(change(path.read_text()))
    config = config_lib.loads(config_lib.dumps(given))
    config.data.path = str(tmp_path / "all" / "data")
    own = config_lib.loads((workdir / "config.json").read_text())
    own.data.path = config.data.path
    (tmp_path / "all" / "workdir" / "config.json").write_text(config_lib.dumps(own))
    results = (workdir / "results.json").read_text()
    with pytest.raises(InputError, match=r"retriever: was trained on other lists, .* delete it"):
        pipeline.main(config, tmp_path / "all" / "workdir")
    assert (tmp_path / "all" / "workdir" / "results.json").read_text() == results


def test_what_a_stage_trained_again_replaces_is_found_again(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "reranker")
    # Joint training began from the re-ranker that was.
    with pytest.raises(
        InputError, match=r"joint: was trained on other lists, or from other models"
    ):
        pipeline.main(config, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "joint")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "w").rglob("*.np[yz]")}
    pipeline.main(config, tmp_path / "w")
    anew = {
        str(p.relative_to(tmp_path / "w"))
        for p, stamp in stamps.items()
        if p.stat().st_mtime_ns != stamp
    }
    assert any(name.startswith("vectors/joint/") for name in anew)
    assert {"eval/test.joint.exact.npz", "eval/test.joint.reranked.exact.npz"} <= anew
    assert "eval/test.reranker.reranked.exact.npz" in anew
    assert "eval/test.zero_shot.exact.npz" not in anew
    assert not any(name.startswith(("vectors/retriever/", "vectors/zero_shot/")) for name in anew)


def test_a_machine_without_git_trains(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    claim(open_run(finished[0], tmp_path / "w"))
    environment = json.loads((tmp_path / "w" / "environment.json").read_text())
    assert environment["commit"] == "unknown"


def test_every_stage_leaves_tensorboard_events_and_a_best_checkpoint(finished):
    _, workdir = finished
    for stage in ("retriever", "reranker", "joint"):
        assert list((workdir / stage).glob("events.out.tfevents.*"))
        assert list((workdir / stage / "best").iterdir())
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__


def test_settings_may_change_until_they_have_been_used(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    changed = config_lib.loads(config_lib.dumps(config))
    changed.evaluate.update({"metrics": ("RR@5",), "rerank_depth": 3})
    claim(open_run(changed, tmp_path / "w"))
    assert json.loads((tmp_path / "w" / "config.json").read_text())["evaluate"]["rerank_depth"] == 3
    changed.joint.list_size = 3
    with pytest.raises(InputError, match=r"joint\.list_size: 4 -> 3"):
        claim(open_run(changed, tmp_path / "w"))
    shutil.rmtree(tmp_path / "w" / "joint")
    claim(open_run(changed, tmp_path / "w"))
    changed.model.attention = "xla"
    # Which drops out no attention weights.
    with pytest.raises(InputError, match=r"model\.attention: 'plain' -> 'xla'"):
        claim(open_run(changed, tmp_path / "w"))
    # What "auto" stands for on a GPU and elsewhere: a run may go on on the other.
    changed.model.attention = "plain"
    elsewhere = open_run(changed, tmp_path / "w")
    for attention in ("ragged", "plain"):
        elsewhere.config.model.attention = attention
        claim(elsewhere)
    changed.mine.depth = 7
    with pytest.raises(InputError, match=r"mine\.depth: 8 -> 7"):
        claim(open_run(changed, tmp_path / "w"))


@pytest.mark.parametrize(
    ("changes", "found_again"),
    [
        ({"scann.leaves_per_sqrt": 2.0}, {"scann"}),
        ({"retrieve_depth": 5}, {"exact", "scann", "reranked.scann", "reranked.bm25"}),
        ({"rerank_depth": 3}, {"reranked.scann", "reranked.bm25"}),
        ({"bm25.k1": 0.01, "bm25.b": 0.0}, {"reranked.bm25"}),
        ({"permutations": 100}, set()),
    ],
)
def test_what_other_settings_change_is_found_again(finished, tmp_path, changes, found_again):
    config, workdir = finished

    def evaluate(settings, folder):
        run = open_run(settings, folder)
        store = tokens.open_store(folder / "data" / "tokens")
        evaluation.evaluate(run, store, "test", ("scann",), states=("joint",))
        return {
            path.name: path.read_text() for path in (folder / "runs").glob("test.joint.*.scann.*")
        }

    shutil.copytree(workdir, tmp_path / "w")
    evaluate(config, tmp_path / "w")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "w" / "eval").glob("test.joint.*.npz")}
    changed = config_lib.loads(config_lib.dumps(config))
    changed.evaluate.update_from_flattened_dict(changes)
    found = evaluate(changed, tmp_path / "w")
    anew = {p.name for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp}
    assert anew == {f"test.joint.{name}.npz" for name in found_again}
    # As in a workdir in which nothing had been found before.
    shutil.copytree(workdir, tmp_path / "fresh", ignore=shutil.ignore_patterns("test.joint.*"))
    assert found == evaluate(changed, tmp_path / "fresh")
    assert len(found) == 2


def test_workdir_of_another_config_is_refused_and_left_alone(finished):
    config, workdir = finished
    changed = config_lib.loads(config_lib.dumps(config))
    changed.joint.learning_rate = 0.5
    before = (workdir / "config.json").read_text()
    with pytest.raises(
        InputError,
        match=r"config\.json.*joint\.learning_rate: 0\.001 -> 0\.5.*or delete .*/joint to",
    ):
        pipeline.main(changed, workdir)
    assert (workdir / "config.json").read_text() == before
    changed.mine.depth = 7
    with pytest.raises(InputError, match=r"mine\.depth: 8 -> 7\); .* it was made by$"):
        pipeline.main(changed, workdir)


def test_two_processes_do_not_work_in_one_workdir(finished, tmp_path):
    config, workdir = finished
    hold = (
        "import pathlib, sys; from rqv2_jax.recipe.workdir import alone\n"
        "with alone(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", hold, str(workdir)]
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process works in it"):
            pipeline.main(config, workdir)
        for program, arguments in (
            ("evaluate", ()),
            ("search", ("a question",)),
            ("check", ()),
            ("export", ("--format=joint-tsv", f"--to={tmp_path / 'lists.tsv'}")),
        ):
            ended = run_program(f"rqv2_jax.{program}", f"--workdir={workdir}", *arguments)
            assert ended.returncode == 1
            assert "another process works in it" in ended.stderr
        # A process that is killed lets go of it.
        other.kill()
        other.wait()
        with alone(workdir):
            pass
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: cannot be made .* give another one"):
        pipeline.main(config, tmp_path / "file")


def test_a_workdir_opens_on_other_devices_than_it_was_made_on(finished, tmp_path, capsys):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    larger = config_lib.loads(config_lib.dumps(config))
    larger.mesh.update({"data": 32, "fsdp": 4})
    larger.model.attention = "cudnn"
    path = tmp_path / "w" / "config.json"
    path.write_text(config_lib.dumps(larger))
    run = open_workdir(tmp_path / "w")
    assert run.sharding.shards == len(jax.devices()) == 8
    assert run.models.retriever.attention == "plain"
    assert "not finished" not in capsys.readouterr().out
    (tmp_path / "w" / "joint" / "finished.txt").unlink()
    open_workdir(tmp_path / "w")
    assert "w/joint: is not finished; its models are the best so far" in capsys.readouterr().out
    path.write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not as rqv2_jax\.main wrote it"):
        open_workdir(tmp_path / "w")


def test_killed_before_its_word_that_it_was_the_end_a_stage_has_no_more_to_do(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "w")
    (tmp_path / "w" / "joint" / "finished.txt").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "w" / "joint").glob("*/[0-9]*")}
    pipeline.main(config, tmp_path / "w")
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "w" / "joint").glob("*/[0-9]*")}
    assert (tmp_path / "w" / "joint" / "finished.txt").is_file()


def test_folder_with_other_files_is_not_taken_for_a_workdir(tmp_path, finished):
    config, _ = finished
    # A process that was killed at once left it.
    (tmp_path / "config.json.partial").write_text("{")
    claim(open_run(config, tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="other files"):
        pipeline.main(config, tmp_path)


def test_what_is_compiled_is_kept_beside_the_workdir(finished, tmp_path):
    config, _ = finished
    setting = "jax_compilation_cache_dir"
    before = jax.config.jax_compilation_cache_dir
    try:
        for given, expected in ((None, tmp_path / ".compiled"), ("/of/mine", "/of/mine")):
            jax.config.update(setting, given)
            open_run(config, tmp_path / "workdir")
            assert jax.config.jax_compilation_cache_dir == str(expected)
    finally:
        jax.config.update(setting, before)


def test_search_finds_what_the_evaluation_found(finished, tmp_path):
    """On the test queries as unlabelled topics; a question of its own is answered the same."""
    config, workdir = finished
    data = pathlib.Path(config.data.path)
    queries = {q["_id"]: q["text"] for q in map(json.loads, (data / "queries.jsonl").open())}
    asked = {name: text for name, text in queries.items() if int(name[1:]) >= 40}
    topics = tmp_path / "topics.tsv"
    topics.write_text("".join(f"{name}\t{text}\n" for name, text in asked.items()))
    arguments = [f"--workdir={workdir}", f"--topics={topics}", f"--to={tmp_path / 'run.trec'}"]
    ended = run_program("rqv2_jax.search", *arguments)
    assert ended.returncode == 0, ended.stderr
    found = trec.read_run(tmp_path / "run.trec")
    expected = trec.read_run(workdir / "runs" / "test.joint.reranker.exact.trec")
    assert found.keys() == expected.keys() == asked.keys()
    for name in asked:
        (ids, scores), (same, close) = (zip(*run[name]) for run in (found, expected))
        assert ids == same
        np.testing.assert_allclose(scores, close, rtol=1e-4, atol=1e-5)
    ended = run_program("rqv2_jax.search", f"--workdir={workdir}", "--shown=8", asked["q41"])
    assert ended.returncode == 0, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines() if re.match(r" *\d+  ", line)]
    assert [row[-1] for row in rows] == [name for name, _ in expected["q41"][:8]]
    # Beyond what is re-ranked a passage has one score.
    assert [len(row) for row in rows] == [4] * config.evaluate.rerank_depth + [3] * 2
    corpus = {p["_id"]: p for p in map(json.loads, (data / "corpus.jsonl").open())}
    assert f"{corpus[rows[0][-1]]['title']}: " in ended.stdout


def test_search_takes_a_question_or_topics(tmp_path):
    for arguments, message in (
        ([], "give a question or --topics"),
        (["a question", "--topics=t", "--to=r"], "give a question or --topics"),
        (["--topics=t"], "--topics and --to go together"),
        ([" "], "the question is empty"),
        (["--topics=t", "--to=/nowhere/r"], "--to /nowhere/r: there is no folder /nowhere"),
        (["--topics=t", f"--to={tmp_path}"], "is a folder; name a file"),
        (["a question"], "is no workdir"),
    ):
        ended = run_program("rqv2_jax.search", f"--workdir={tmp_path}", *arguments)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert message in ended.stderr


def test_what_better_params_replace_is_found_again(finished, tmp_path):
    """A stage may be evaluated before its end; what was found by then is not taken for the end's."""
    workdir = tmp_path / "w"
    shutil.copytree(finished[1], workdir)
    run, store = open_workdir(workdir), tokens.open_store(workdir / "data" / "tokens")
    # Where joint training began, and what its models found at last.
    before = {
        "joint.retriever.exact": "retriever.retriever.exact",
        "joint.retriever.scann": "retriever.retriever.scann",
        "joint.reranker.exact": "reranker.reranker.exact",
    }

    def evaluated():
        evaluation.evaluate(run, store, "test", ("exact", "scann"))
        return {
            name: trec.read_run(workdir / "runs" / f"test.{name}.trec")
            for name in (*before.keys(), *before.values())
        }

    whole = evaluated()
    (best,) = (workdir / "joint" / "best").glob("[0-9]*")
    best.rename(tmp_path / "kept")
    warm = {model: run.params(state="reranker", model=model) for model in ("retriever", "reranker")}
    with contextlib.closing(Checkpoints(workdir / "joint")) as checkpoints:
        checkpoints.save_best(int(best.name) + 1, warm, "dev RR@10", 1.0)
    earlier = evaluated()
    for joint, warmed_up in before.items():
        assert earlier[joint] == whole[warmed_up] != whole[joint]
    shutil.rmtree(workdir / "joint" / "best" / str(int(best.name) + 1))
    (tmp_path / "kept").rename(best)
    assert evaluated() == whole


def test_scorer_agrees_with_the_run_files(finished):
    """The README's snippet: a checkpoint restored in Python scores as the pipeline did."""
    config, workdir = finished
    scorer = score.open_scorer(str(workdir), "joint")
    data = pathlib.Path(config.data.path)
    corpus = {p["_id"]: p for p in map(json.loads, (data / "corpus.jsonl").open())}
    query = {q["_id"]: q["text"] for q in map(json.loads, (data / "queries.jsonl").open())}["q41"]
    lines = (workdir / "runs" / "test.joint.retriever.exact.trec").read_text().splitlines()
    rows = [line.split() for line in lines if line.startswith("q41 ")]
    passages = [(corpus[row[2]]["title"], corpus[row[2]]["text"]) for row in rows]
    retriever_P, reranker_P = scorer(query, passages)
    np.testing.assert_allclose(retriever_P, [float(row[4]) for row in rows], rtol=1e-4, atol=1e-5)
    lines = (workdir / "runs" / "test.joint.reranker.exact.trec").read_text().splitlines()
    reranked = {r[2]: float(r[4]) for r in map(str.split, lines) if r[0] == "q41"}
    depth = config.evaluate.rerank_depth
    expected = [reranked[row[2]] for row in rows[:depth]]
    np.testing.assert_allclose(reranker_P[:depth], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def joint_again(finished, tmp_path_factory):
    """`train_joint(**settings)` trains jointly with other settings from the same warm models.

    With `stop`, a pattern of a printed line, it stops there and starts again.
    """
    config, workdir = finished
    store = tokens.open_store(workdir / "data" / "tokens")

    def train_joint(*, stop=None, **settings):
        changed = config_lib.loads(config_lib.dumps(config))
        changed.joint.update(settings)
        folder = tmp_path_factory.mktemp("joint")
        for kept in ("retriever", "reranker", "vectors", "lists"):
            shutil.copytree(workdir / kept, folder / kept)
        run = open_run(changed, folder)
        candidates = mining.mine(run, store, mining.retrieve(run, store))
        printed = []
        with pytest.MonkeyPatch.context() as patch:
            say = tqdm.tqdm.write

            def listen(text):
                first = stop and not any(re.match(stop, line) for line in printed)
                printed.append(text)
                if first and re.match(stop, text):
                    raise InterruptedError
                say(text)

            patch.setattr(tqdm.tqdm, "write", listen)
            if stop:
                with pytest.raises(InterruptedError):
                    pipeline.train_joint(run, store, candidates)
                # Nothing goes on being written or deleted once an interrupted run is out.
                assert len(list((folder / "joint" / "last").iterdir())) == 1
            pipeline.train_joint(run, store, candidates)
        return last_joint_params(run), folder, printed

    return train_joint


def test_refreshed_lists_come_from_the_models_as_they_are(joint_again):
    params, folder, printed = joint_again(refresh_every=2)
    assert [line for line in printed if "refresh" in line] == [
        f"  refresh: candidates by the models of step {step}" for step in (2, 4)
    ]
    found = {}
    for name in ("", "joint.0000002/", "joint.0000004/"):
        with np.load(folder / "lists" / f"{name}train.retrieved.npz") as file:
            found[name] = dict(file)
    assert len({arrays["scores"].tobytes() for arrays in found.values()}) == 3
    (warm_Q, *_) = (arrays["query_rows"] for arrays in found.values())
    assert all((arrays["query_rows"] == warm_Q).all() for arrays in found.values())
    with np.load(folder / "lists" / "joint.0000004" / "train.scores" / "00000.npz") as file:
        assert file["scores"].shape == found[""]["passages"].shape
    # The last line of training counts steps through all segments.
    assert any(line.startswith("  joint 6/6") for line in printed)
    # The new candidates are what is trained on: nothing else sets this run apart from one without.
    kept, _, _ = joint_again()
    pairs = zip(_leaves(params), _leaves(kept))
    assert not all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_candidates_that_cannot_be_made_again_are_missed(finished, joint_again, monkeypatch):
    config, _ = finished
    _, folder, _ = joint_again(refresh_every=3)
    steps = sorted((folder / "joint" / "last").glob("[0-9]*"))
    assert [p.name for p in steps] == ["6"]
    # As if it had been stopped at the last step but one, and the candidates were damaged since.
    os.truncate(folder / "lists" / "joint.0000003" / "train.retrieved.npz", 100)
    (folder / "joint" / "finished.txt").unlink()
    restore = Checkpoints.restore_last

    def earlier(self, state):
        state = restore(self, state)
        return state._replace(step=state.step - 1)

    monkeypatch.setattr(Checkpoints, "restore_last", earlier)
    changed = config_lib.loads(config_lib.dumps(config))
    changed.joint.refresh_every = 3
    run = open_run(changed, folder)
    store = tokens.open_store(finished[1] / "data" / "tokens")
    candidates = mining.mine(run, store, mining.retrieve(run, store))
    with pytest.raises(InputError, match=r"joint\.0000003: the candidates of step 3 are gone"):
        pipeline.train_joint(run, store, candidates)


@pytest.mark.parametrize("stop", [r"  joint 2/6 ", r"  refresh: .* step 3", r"  joint 6/6 .*loss"])
def test_refreshing_resumes_with_the_same_models(joint_again, stop):
    whole, _, _ = joint_again(refresh_every=3)
    again, _, _ = joint_again(refresh_every=3, stop=stop)
    for a, b in zip(_leaves(whole), _leaves(again)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_static_distillation_leaves_the_reranker_alone(finished, joint_again):
    params, _, _ = joint_again(train_reranker=False)
    warm = open_workdir(finished[1])
    for model, same in (("reranker", True), ("retriever", False)):
        pairs = zip(_leaves(params[model]), _leaves(warm.params(state="reranker", model=model)))
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs) == same


@pytest.mark.parametrize("step", [0, 2])
def test_candidates_are_scored_by_the_query_tower_and_the_passage_tower(
    finished, joint_again, monkeypatch, step
):
    """In mining, in a refresh and on dev: swapped towers give other scores than these."""
    refreshed = []
    refresh = mining.refresh

    def listen(run, store, candidates, step, params):
        refreshed.append((step, jax.tree.map(np.asarray, params["retriever"])))
        return refresh(run, store, candidates, step, params)

    monkeypatch.setattr(mining, "refresh", listen)
    run, store = open_workdir(finished[1]), tokens.open_store(finished[1] / "data" / "tokens")
    if step == 0:
        folder, params = finished[1] / "lists", run.params(state="retriever", model="retriever")
    else:
        folder = joint_again(refresh_every=2)[1] / "lists" / f"joint.{step:07}"
        params = dict(refreshed)[step]
    with np.load(folder / "dev.retrieved.npz") as file:
        found = dict(file)
    queries_QxD = encode.queries(
        run.forward, params["query"], store.splits["dev"].texts, found["query_rows"]
    )
    everything = np.arange(len(store.passage_ids))
    passages_NxD = encode.passages(run.forward, params["passage"], store, everything)
    scores_QxN = np.take_along_axis(queries_QxD @ passages_NxD.T, found["passages"], axis=1)
    np.testing.assert_allclose(found["scores"], scores_QxN, rtol=1e-4, atol=1e-4)
    swapped = {"query": params["passage"], "passage": params["query"]}
    dev = Dev(run.config, run.forward, store, mining.retrieve(run, store)["dev"])
    order_Q = np.argsort(found["query_rows"])
    pool_QxN = queries_QxD[order_Q] @ passages_NxD[dev.pool_N].T
    reciprocal = []
    for row, scores_N in zip(dev.rows_Q, pool_QxN):
        # Query dev row i asks for passage 32 + i.
        at = dev.pool_N.tolist().index(store.passage_ids.index(f"p{32 + row}"))
        rank = 1 + (scores_N > scores_N[at]).sum()
        reciprocal.append(1 / rank if rank <= 10 else 0)
    assert dev.retriever(params) == pytest.approx(np.mean(reciprocal))
    assert dev.retriever(swapped) != dev.retriever(params)


def test_given_lists_that_contradict_each_other_are_mended(finished, tmp_path, capsys):
    path = tmp_path / "lists.tsv"
    lists = [("a", "river", "stone"), ("a", "stone", "river"), ("b", "river", "engine")]
    path.write_text("".join(f"{q}\t\t{p}\t1\n{q}\t\t{n}\t0\n" for q, p, n in lists))
    changed = config_lib.loads(config_lib.dumps(finished[0]))
    changed.joint.update({"lists": str(path), "list_size": 2, "epochs": 1.0})
    _, found = mining.read_lists(open_run(changed, tmp_path / "w"))
    said = capsys.readouterr().out
    assert "2 of the file's negatives are positives of other lists of their query" in said
    assert "3 lists of 2: 3 labelled_positive, 2 random_fill, 1 given_negative" in said
    # The only passage of the file that is no positive of "a".
    (engine,) = found.passages_LxP[found.provenance_LxP == lists_lib.Provenance.GIVEN_NEGATIVE]
    filled = found.passages_LxP[found.provenance_LxP == lists_lib.Provenance.RANDOM_FILL]
    np.testing.assert_array_equal(filled, [engine, engine])


def test_given_lists_are_read_before_any_training(finished, tmp_path):
    path = tmp_path / "lists.tsv"
    path.write_text("a\t\triver\t1\na\t\tstone\t0\na\t\tstone\t1\na\t\triver\t0\n")
    changed = config_lib.loads(config_lib.dumps(finished[0]))
    changed.joint.update({"lists": str(path), "list_size": 2})
    with pytest.raises(InputError, match=r"lists\.tsv: has too few passages to stand in for"):
        pipeline.main(changed, tmp_path / "w")
    changed.joint.list_size = 3
    with pytest.raises(InputError, match=r"lists\.tsv:.*set config\.joint\.list_size"):
        pipeline.main(changed, tmp_path / "w")
    assert not (tmp_path / "w" / "retriever").exists()


def test_exported_lists_can_be_trained_on(finished, joint_again, tmp_path):
    config, workdir = finished
    path = tmp_path / "lists.tsv.gz"
    ended = run_program(
        "rqv2_jax.export", f"--workdir={workdir}", "--format=joint-tsv", f"--to={path}"
    )
    assert ended.returncode == 0, ended.stderr
    run = open_workdir(workdir)
    store = tokens.open_store(workdir / "data" / "tokens")
    candidates = mining.mine(run, store, mining.retrieve(run, store))
    drawn = mining.draw_lists(run.config, store, candidates, "joint")
    _, folder, printed = joint_again(lists=str(path), epochs=1.0)
    assert any(line.startswith(f"  {len(drawn.query_rows_L)} lists of 4: ") for line in printed)
    given = tokens.open_store(folder / "lists" / "given")
    changed = config_lib.loads(config_lib.dumps(config))
    changed.joint.update({"lists": str(path), "epochs": 1.0})
    _, read = mining.read_lists(open_run(changed, folder))

    def words(lists, store):
        texts = store.splits["train"].texts
        return sorted(
            (
                tuple(texts.tokens[texts.offsets[query] : texts.offsets[query + 1]]),
                *(
                    tuple(store.texts.tokens[store.texts.offsets[p] : store.texts.offsets[p + 1]])
                    for p in passages
                ),
            )
            for query, passages in zip(lists.query_rows_L, lists.passages_LxP)
        )

    assert words(read, given) == words(drawn, store)


def test_denoise_report_of_a_workdir(finished):
    config, workdir = finished
    data = pathlib.Path(config.data.path)
    (data / "fuller").mkdir(exist_ok=True)
    for split in ("train", "dev", "test"):
        text = (data / "qrels" / f"{split}.tsv").read_text()
        if split == "train":
            text += "".join(f"q{i}\tp{(i + 7) % 48}\t1\n" for i in range(32))
        (data / "fuller" / f"{split}.tsv").write_text(text)
    ended = run_program("rqv2_jax.check", f"--workdir={workdir}", "--labels=fuller", "--samples=3")
    assert ended.returncode == 0, ended.stderr
    assert "32 queries with scored candidates" in ended.stdout
    report = json.loads((workdir / "eval" / "denoise.json").read_text())
    assert report["labelled"] + report["unlabelled"] == 32 * config.mine.depth
    assert 0 < report["hidden"] <= 32
    corpus = {f"{p['title']}: {p['text']}" for p in map(json.loads, (data / "corpus.jsonl").open())}
    for sample in report["samples"]:
        assert {sample["labelled"], sample["candidate"]} <= corpus
        assert sample["labelled"] != sample["candidate"]
        # A query is five words of its labelled passage.
        assert set(sample["query"].split()) <= set(sample["labelled"].split())
        assert sample["probability"] >= config.mine.negative_below
    ended = run_program("rqv2_jax.check", f"--workdir={workdir}", "--labels=nowhere")
    assert ended.returncode == 1
    assert "nowhere: no such qrels folder" in ended.stderr


def test_exported_models_score_in_sentence_transformers_as_here(finished, tmp_path):
    config, workdir = finished
    folder = tmp_path / "models"
    arguments = [f"--workdir={workdir}", "--format=huggingface", f"--to={folder}"]
    ended = run_program("rqv2_jax.export", *arguments)
    assert ended.returncode == 0, ended.stderr
    query, title, text = "river stone engine", "copper letter", "market signal forest bridge river"
    retriever_1, reranker_1 = score.open_scorer(str(workdir), "joint")(query, [(title, text)])

    def read(name, model, *texts):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        loaded, report = model.from_pretrained(folder / name, output_loading_info=True)
        # BertModel has a pooler, which no score reads.
        assert {key.split(".")[0] for key in report["missing_keys"]} <= {"pooler"}
        assert not report["unexpected_keys"]
        with torch.no_grad():
            return loaded.eval()(**tokenizer(*texts, return_tensors="pt"))

    vectors = [
        # A title and its text are two texts to this model (title_sep_text).
        read(tower, transformers.BertModel, *texts).last_hidden_state.mean(dim=1)[0]
        for tower, texts in (("query", (query,)), ("passage", (title, text)))
    ]
    assert float(vectors[0] @ vectors[1]) == pytest.approx(float(retriever_1[0]), rel=1e-4)
    # With the activation that the export names, none.
    scorer = sentence_transformers.CrossEncoder(str(folder / "reranker"), device="cpu")
    (logit,) = scorer.predict([(query, f"{title} {text}")])
    assert float(logit) == pytest.approx(float(reranker_1[0]), rel=1e-3, abs=1e-4)
    # As it was trained: with mean pooling and dot products.
    tower = sentence_transformers.SentenceTransformer(str(folder / "query"), device="cpu")
    assert (tower.max_seq_length, tower.similarity_fn_name) == (16, "dot")
    np.testing.assert_allclose(tower.encode(query), vectors[0], rtol=0, atol=1e-5)
    # The towers were trained apart, and the folder is not written over.
    towers = [(folder / name / "model.safetensors").read_bytes() for name in ("query", "passage")]
    assert towers[0] != towers[1]
    ended = run_program("rqv2_jax.export", *arguments)
    assert ended.returncode == 1
    assert "models: exists; name a folder that does not" in ended.stderr
    assert open_workdir(workdir).config.model.passage_format == "title_sep_text"

    # They are a warm start as well: nothing is left to warm up.
    warm = config_lib.loads(config_lib.dumps(config))
    warm.model.weights = str(folder)
    warm.retriever.epochs = warm.reranker.epochs = 0.0
    run = open_run(warm, tmp_path / "warm")
    for model in ("retriever", "reranker"):
        found, trained = (
            r.params(state=state, model=model)
            for r, state in ((run, "reranker"), (open_workdir(workdir), "joint"))
        )
        assert jax.tree.structure(found) == jax.tree.structure(trained)
        for ours, theirs in zip(_leaves(found), _leaves(trained)):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    described = json.loads((folder / "passage" / "config.json").read_text())
    described["layer_norm_eps"] *= 2
    (folder / "passage" / "config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"passage/config\.json: describes another encoder"):
        open_run(warm, tmp_path / "warm")
    warm.model.weights = config.model.weights
    with pytest.raises(InputError, match="has no trained re-ranker; give"):
        open_run(warm, tmp_path / "warm")


def test_report_and_export_need_what_they_read(finished, tmp_path):
    config, workdir = finished

    def refused(action, message, **settings):
        changed = config_lib.loads(config_lib.dumps(config))
        changed.joint.update(settings)
        with pytest.raises(InputError, match=message) as e:
            action(open_run(changed, tmp_path / "w"))
        assert "\n" not in str(e.value)

    def report(run):
        denoising.denoise_report(run, "", 1)

    def export(run):
        pipeline.export_lists(run, tmp_path / "lists.tsv")

    shutil.copytree(workdir, tmp_path / "w")
    refused(export, "refresh_every is 3", refresh_every=3)
    refused(export, r"joint\.lists is 'x'", lists="x")
    refused(report, "denoised_share is 0", denoised_share=0.0)
    manifest = tmp_path / "w" / "data" / "tokens" / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(before.replace('"source": "', '"source": "0'))
    for action in (report, export):
        refused(action, "the texts of data have changed since this workdir was made")
    manifest.write_text(before)
    shutil.rmtree(tmp_path / "w" / "lists" / "dev.scores")
    for action in (report, export):
        refused(action, "holds no candidates yet; run")
    # Undenoised lists need no scores.
    changed = config_lib.loads(config_lib.dumps(config))
    changed.joint.denoised_share = 0.0
    export(open_run(changed, tmp_path / "w"))
    assert len((tmp_path / "lists.tsv").read_text().splitlines()) == 4 * round(1.5 * 32)
    ended = run_program(
        "rqv2_jax.export", f"--workdir={workdir}", "--format=joint-tsv", "--to=/nowhere/lists.tsv"
    )
    assert ended.returncode == 1
    assert "error: --to /nowhere/lists.tsv" in ended.stderr


def test_unwarmed_retriever_is_the_starting_model(tmp_path, finished, bert_folder):
    config, _ = finished
    skipped = config_lib.loads(config_lib.dumps(config))
    skipped.retriever.epochs = 0.0
    run = open_run(skipped, tmp_path / "w")
    assert run.trained_by(state="joint", model="retriever") == "joint"
    assert run.trained_by(state="retriever", model="retriever") == "zero_shot"
    encoder = weights.load_encoder(pathlib.Path(bert_folder), run.models.retriever)
    params = run.params(state="retriever", model="retriever")
    for tower in ("query", "passage"):
        for ours, theirs in zip(_leaves(params[tower]), _leaves(encoder)):
            np.testing.assert_array_equal(np.asarray(ours), theirs)


def test_reranker_of_an_untrained_state_is_refused(finished):
    run = open_workdir(finished[1])
    with pytest.raises(InputError, match="zero_shot"):
        run.params(state="zero_shot", model="reranker")


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
    assert dev._score(found_QxK, np.array([[2.0, 1.0]] * 8)) == 1.0
    assert dev._score(found_QxK, np.array([[1.0, 2.0]] * 8)) == 0.5


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda d: (d / "qrels" / "train.tsv").unlink(), "train.tsv"),
        (lambda d: _append(d / "corpus.jsonl", "{nonsense\n"), r"corpus\.jsonl:49: .*JSON"),
        (
            lambda d: _append(d / "corpus.jsonl", '{"_id": "p0", "text": "again"}\n'),
            r"corpus\.jsonl:49: .*p0",
        ),
        (
            lambda d: _append(d / "corpus.jsonl", '{"_id": "new", "text": 7}\n'),
            r"corpus\.jsonl:49: `text` is 7",
        ),
        (
            lambda d: _append(d / "qrels" / "dev.tsv", "q33\tnowhere\t1\n"),
            r"dev\.tsv:10: .*nowhere",
        ),
    ],
)
def test_bad_data_is_one_line_with_file_and_line(tmp_path, bert_folder, breakage, message):
    data = write_beir(tmp_path / "data")
    breakage(data)
    with pytest.raises(InputError, match=message) as e:
        pipeline.main(tiny_config(data, bert_folder), tmp_path / "workdir")
    assert "\n" not in str(e.value)


def _append(path, text):
    with path.open("a") as f:
        f.write(text)


def run_program(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


FAILURES = """
import threading, time
from rqv2_jax import program

def by_the_system():
    with open("/dev/full", "w") as file:
        file.write("x")

def by_orbax():
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise ValueError("RESOURCE_EXHAUSTED: writing to file 20:\\nNo space left on device [code='28']")

def otherwise():
    raise ValueError("a defect")

program.run({}, "")
"""


def run_failure(name):
    command = [sys.executable, "-c", FAILURES.format(name)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("where", ["by_the_system", "by_orbax"])
def test_a_full_disk_ends_in_one_line_at_once(where):
    ended = run_failure(where)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: the disk is full (")
    assert ended.stderr.count("\n") == 1
    assert "No space left on device" in ended.stderr
    assert "same command again" in ended.stderr


def test_a_defect_keeps_its_traceback():
    ended = run_failure("otherwise")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback")
    assert ended.stderr.endswith("ValueError: a defect\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.joint.epoch=3"], "no such setting: 'epoch'"),
        (["--config.joint.epochs=many"], "could not convert string to float: 'many'"),
        (["--config.seed=-1"], "config.seed is -1"),
        (["surplus"], "unexpected argument 'surplus'"),
        (["--confg=x"], "Unknown command line flag 'confg'"),
        (["--config.data.path=/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_wrong_command_lines_end_in_one_line_and_a_failure(tmp_path, arguments, message):
    base = ["--config=configs/beir.py", f"--workdir={tmp_path / 'w'}", "--config.data.path=x"]
    ended = run_program("rqv2_jax.main", *base, *arguments)
    assert ended.returncode in (1, 2)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in ended.stderr


def test_a_flag_file_changes_the_config(tmp_path):
    file = tmp_path / "machine.flags"
    file.write_text("--config.mesh.data=2\n--config.seed=-2\n")
    base = ["--config=configs/beir.py", f"--workdir={tmp_path / 'w'}", "--config.data.path=x"]
    ended = run_program("rqv2_jax.main", *base, f"--flagfile={file}")
    assert ended.returncode == 1
    assert "error: config.seed is -2; it must lie in" in ended.stderr
    ended = run_program("rqv2_jax.main", *base, "--flagfile=/nowhere")
    assert ended.returncode == 2
    assert "error: ERROR:: Unable to open flagfile" in ended.stderr


def test_help_shows_an_example():
    ended = run_program("rqv2_jax.main", "--help")
    assert ended.returncode == 0
    assert "python -m rqv2_jax.main --config" in ended.stdout


@pytest.mark.slow
def test_given_lists_train_given_models(finished, tmp_path):
    """Neither a warm-up nor mining is left to do, so no training query is searched for."""
    config, workdir = finished
    for form, name in (("huggingface", "models"), ("joint-tsv", "lists.tsv")):
        arguments = [f"--workdir={workdir}", f"--format={form}", f"--to={tmp_path / name}"]
        ended = run_program("rqv2_jax.export", *arguments)
        assert ended.returncode == 0, ended.stderr
    given = config_lib.loads(config_lib.dumps(config))
    given.model.weights = str(tmp_path / "models")
    given.retriever.epochs = given.reranker.epochs = 0.0
    given.joint.update({"lists": str(tmp_path / "lists.tsv"), "epochs": 1.0})
    pipeline.main(given, tmp_path / "workdir")
    assert (tmp_path / "workdir" / "lists" / "dev.retrieved.npz").is_file()
    assert not (tmp_path / "workdir" / "lists" / "train.retrieved.npz").exists()
    found, given_models = (
        next(
            row["metrics"]
            for row in json.loads((folder / "results.json").read_text())["rows"]
            if (row["state"], row["model"], row["index"]) == (state, "reranker", "exact")
        )
        for folder, state in ((tmp_path / "workdir", "reranker"), (workdir, "joint"))
    )
    assert found == given_models
    trained = list((tmp_path / "workdir" / "joint" / "last").glob("[0-9]*"))
    assert trained
    assert all(int(path.name) > 0 for path in trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("nq", {"Success@5", "Success@20", "Success@100"}),
        ("msmarco", {"RR@10", "Success@50", "R@1000", "nDCG@10"}),
    ],
)
def test_tiny_presets_run_the_whole_recipe(tmp_path, name, metrics):
    workdir = tmp_path / "workdir"
    ended = run_program("rqv2_jax.main", f"--config=configs/{name}.py:tiny", f"--workdir={workdir}")
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    exact = [(row["state"], row["model"]) for row in rows if row["index"] == "exact"]
    assert exact == [
        *(("released", "retriever"), ("zero_shot", "retriever"), ("retriever", "retriever")),
        *(("reranker", "reranker"), ("joint", "retriever"), ("joint", "reranker")),
    ]
    for row in rows:
        assert set(row["metrics"]) == metrics
        assert row["queries"] == 60


@pytest.mark.slow
def test_the_retriever_learns_from_the_reranker_alone(tmp_path):
    """On real text: without KL the retriever stays at its start; with it, it rises on dev.

    Weight decay, which knows no loss, is off.
    """
    config = config_lib.default()
    config_lib.two_cores(config)
    config.data.dataset = "docstrings"
    config.model.num_layers = 3
    config.optimizer.weight_decay = 0.0
    config.mine.update({"queries": 800, "depth": 16})
    config.reranker.most_lists = 160
    config.joint.update({"epochs": 1.0, "denoised_share": 0.0, "evaluate_every": 100})
    config.joint.reranker_rate = 3.0
    config.dev.update({"queries": 200, "depth": 5, "pool": 500})
    warm = open_run(config, tmp_path / "warm")
    store, candidates = pipeline.warm_up(warm)
    scores = {}
    for weight, lists in ((0.0, 48), (1.0, 320)):
        config.joint.update({"kl_weight": weight, "most_lists": lists})
        run = open_run(config, tmp_path / f"kl {weight}")
        branch(run.workdir, warm.workdir)
        pipeline.train_joint(run, store, candidates)
        curves = figures.curves(run.workdir / "joint")
        scores[weight] = [score for _, score in curves["dev/retriever RR@10"]]
    assert scores[0.0][-1] == scores[0.0][0]
    assert scores[1.0][-1] > scores[1.0][0] + 0.02


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_results(tmp_path, bert_folder, finished):
    config = tiny_config(write_beir(tmp_path / "data"), bert_folder)
    config_file = tmp_path / "config.py"
    config_file.write_text(
        "from rqv2_jax import config\n"
        f"def get_config():\n    return config.loads({config_lib.dumps(config)!r})\n"
    )
    workdir = tmp_path / "workdir"
    command = [
        *(sys.executable, "-u", "-m", "rqv2_jax.main"),
        *(f"--config={config_file}", f"--workdir={workdir}"),
    ]
    points = [
        r"^prepare",
        r"^  retriever 4/",
        r"^retrieve:",
        r"^  reranker 4/",
        r"^mine:",
        r"^  joint 2/",
        r"^  joint 4/",
        r"^evaluate:",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for point in points:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        seen = False
        for line in process.stdout:
            if re.match(point, line):
                seen = True
                time.sleep(0.2)
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        assert seen, f"never reached {point}"
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    killed = json.loads((workdir / "results.json").read_text())
    whole = json.loads((finished[1] / "results.json").read_text())
    assert killed == whole
