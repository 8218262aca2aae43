"""Search over a finished run, by the command and from Python."""

import json
import pathlib
import re

import numpy as np
from tiny_run import run_program

from rqv2_jax.ranking import trec
from rqv2_jax.recipe import scorer as score


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


def test_search_takes_questions_or_topics_or_serves(tmp_path):
    for arguments, message in (
        ([], "there is no question on standard input"),
        (
            ["a question", "--topics=t", "--to=r"],
            "give one of a question, --topics FILE, and --serve",
        ),
        (["a question", "--serve"], "give one of a question, --topics FILE, and --serve"),
        (["--serve", "--json"], "--json answers questions"),
        (["a question", "--port=1"], "--port is for the page; give --serve, too"),
        (["--topics=t"], "--topics and --to go together"),
        ([" "], "the question is empty"),
        (["--topics=t", "--to=/nowhere/r"], "--to /nowhere/r: there is no folder /nowhere"),
        (["--topics=t", f"--to={tmp_path}"], "is a folder; name a file"),
        (["a question"], "is no workdir"),
    ):
        ended = run_program("rqv2_jax.search", f"--workdir={tmp_path}", *arguments)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert message in ended.stderr


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
