"""What a run has to beat: BM25 and the released model."""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_run import tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax.data import tokens
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import trec
from rqv2_jax.recipe import evaluation, pipeline, rankings
from rqv2_jax.recipe.run import as_released, open_run
from rqv2_jax.recipe.texts import open_collection
from rqv2_jax.retrieval import bm25


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
    own = evaluation.Scoreboard(run, store, "test")
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
