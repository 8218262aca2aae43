"""rqv2_jax.evaluate: further queries over the passages of a run, and candidates from a run file."""

import json
import pathlib
import shutil

import ir_measures
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from tiny_run import run_program, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax import evaluate
from rqv2_jax.data import tokens
from rqv2_jax.errors import InputError
from rqv2_jax.models.scoring import tower
from rqv2_jax.ranking import trec
from rqv2_jax.recipe import evaluation, results
from rqv2_jax.recipe import scorer as score
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.recipe.run import open_run
from rqv2_jax.recipe.texts import with_topics
from rqv2_jax.retrieval import encode


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
        ("b", "q0 Q0 p0 1 2.5 x\n", "holds none of the 8 test queries that are to be re-ranked"),
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


def test_elsewhere_measures_the_trained_models_on_another_collection(deep, capsys):
    write_beir(deep / "other", passages=60, seed=5)
    # Only test is needed there.
    (deep / "other/qrels/train.tsv").unlink()
    (deep / "other/qrels/dev.tsv").unlink()
    before = (deep / "w/eval/test.json").read_text()
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(workdir=str(deep / "w"), elsewhere=str(deep / "other")):
        evaluate.main()
    assert "60 passages, 8 test queries; nothing was trained on it" in capsys.readouterr().out
    folder = deep / "w/elsewhere/other"
    report = json.loads((folder / "eval/test.json").read_text())
    states = {(row["state"], row["model"]) for row in report["rows"]}
    assert states >= {("bm25", "bm25"), ("joint", "retriever"), ("joint", "reranker")}
    assert ("zero_shot", "retriever") not in states
    assert report["verdict"]
    # Its rankings are those of the trained vectors, and its own passages.
    run = open_workdir(deep / "w")
    store = tokens.open_store(folder / "data/tokens")
    towers = run.params(state="joint", model="retriever")
    passages = encode.passages(run.forward, tower(towers, "passage"), store, np.arange(60))
    queries = store.splits["test"]
    vectors = encode.queries(run.forward, tower(towers, "query"), queries.texts, np.arange(8))
    best = np.argsort(-(vectors @ passages.T), axis=1)[:, 0]
    found = trec.read_run(folder / "runs/test.joint.retriever.exact.trec")
    expected = {q: store.passage_ids[row] for q, row in zip(queries.ids, best)}
    assert {query: ranking[0][0] for query, ranking in found.items()} == expected
    assert (deep / "w/eval/test.json").read_text() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"split": "dev"}, "has no qrels for dev, only for test"),
        ({"topics": "t", "qrels": "q"}, "--elsewhere goes with neither"),
    ],
)
def test_elsewhere_that_cannot_be_measured(deep, more, message):
    write_beir(deep / "other")
    for split in ("train", "dev"):
        (deep / f"other/qrels/{split}.tsv").unlink()
    flags.FLAGS.mark_as_parsed()
    with (
        flagsaver.flagsaver(workdir=str(deep / "w"), elsewhere=str(deep / "other"), **more),
        pytest.raises(InputError, match=message),
    ):
        evaluate.main()
